"""Structures of a precision matrix over adapter weights; they know nothing of models or data."""

from .base import Precision, precision_from_tensors
from .block_tridiagonal import BlockTridiagonalPrecision
from .delta_diagonal import DeltaDiagonalPrecision
from .delta_kronecker import DeltaKroneckerPrecision
from .dense import DensePrecision
from .diagonal import DiagonalPrecision
from .ekfac import DeltaEigenKroneckerPrecision, EigenKroneckerPrecision
from .factor import EigenFactor
from .kronecker import KroneckerBlocks, KroneckerPrecision
from .low_rank import LowRankPrecision


__all__ = [
    "BlockTridiagonalPrecision",
    "DeltaDiagonalPrecision",
    "DeltaEigenKroneckerPrecision",
    "DeltaKroneckerPrecision",
    "DensePrecision",
    "DiagonalPrecision",
    "EigenFactor",
    "EigenKroneckerPrecision",
    "KroneckerBlocks",
    "KroneckerPrecision",
    "LowRankPrecision",
    "Precision",
    "precision_from_tensors",
]
