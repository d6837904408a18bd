"""Structures of a precision matrix over adapter weights; they know nothing of models or data."""

from .base import Precision, precision_from_tensors
from .delta_diagonal import DeltaDiagonalPrecision
from .delta_kronecker import DeltaKroneckerPrecision
from .diagonal import DiagonalPrecision
from .factor import EigenFactor
from .kronecker import KroneckerPrecision


__all__ = [
    "DeltaDiagonalPrecision",
    "DeltaKroneckerPrecision",
    "DiagonalPrecision",
    "EigenFactor",
    "KroneckerPrecision",
    "Precision",
    "precision_from_tensors",
]
