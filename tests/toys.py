"""Linear models under LoKO, small enough for dense references in float64."""

import torch
from torch import nn

from kalman_peft import CategoricalObservation, GaussianObservation, LoKO


F64 = torch.float64
EXACT = {
    "memory": "dense", "columns": "exact", "gain": "joint", "max_decrease": None, "curvature_every": 1, "damping": 0.0,
}  # fmt: skip


class Linear:
    """Outputs W x + b, with its filter: "classes" (softmax), "tokens" (softmax at 3 positions) or "values"."""

    def __init__(self, kind="classes", outputs=4, inputs=6, dtype=F64, known=None, **options):
        generator = torch.Generator().manual_seed(0)
        self.kind, self.outputs, self.inputs = kind, outputs, inputs
        self.w = nn.Parameter(0.3 * torch.randn(outputs, inputs, generator=generator, dtype=F64).to(dtype))
        self.b = nn.Parameter(torch.zeros(outputs, dtype=dtype))
        observation = GaussianObservation(0.5) if kind == "values" else CategoricalObservation(shift=False)
        observation = options.pop("observation", observation)
        if options.get("mode") != "paper":
            options.setdefault("adaptive_noise", 0.0)
        precisions = None if known is None else {"w": known, "b": known}
        self.optimizer = LoKO([("w", self.w), ("b", self.b)], observation, prior_precision=precisions, **options)
        self.size = outputs * inputs + outputs

    @property
    def theta(self):
        return torch.cat([self.w.detach().reshape(-1), self.b.detach()])

    def batch(self, seed, n=5):
        generator = torch.Generator().manual_seed(100 + seed)
        leading = (n, 3) if self.kind == "tokens" else (n,)
        x = torch.randn(*leading, self.inputs, generator=generator, dtype=F64).to(self.w.dtype)
        if self.kind == "values":
            return x, torch.randn(n, self.outputs, generator=generator, dtype=F64)
        labels = torch.randint(0, self.outputs, leading, generator=generator)
        if self.kind == "tokens":
            labels[0, 1:] = -100
        return x, labels

    def __call__(self, x):
        return x @ self.w.mT + self.b

    def observe(self, x, labels):
        return self.optimizer.observe(self(x), labels)

    def step(self, seed, n=5):
        self.observe(*self.batch(seed, n))
        self.optimizer.step()

    def run(self, steps, n=5):
        for seed in range(steps):
            self.step(seed, n)
        return self

    def evidence(self, x, labels, variance=0.5):
        """Score and information at the present weights, row by row; and the number of labels and of sequences."""
        score, information = torch.zeros(self.size, dtype=F64), torch.zeros(self.size, self.size, dtype=F64)
        counts, sequences = 0, set()
        for i, row in enumerate(x.reshape(len(x), -1, self.inputs).double()):
            for t, inputs in enumerate(row):
                jacobian = torch.cat(
                    [torch.kron(torch.eye(self.outputs, dtype=F64), inputs), torch.eye(self.outputs, dtype=F64)], 1
                )
                z = self(inputs.to(self.w.dtype)).detach().double()
                if self.kind == "values":
                    residual, h = (labels[i] - z) / variance, torch.eye(self.outputs, dtype=F64) / variance
                else:
                    label = labels.reshape(len(x), -1)[i, t]
                    if label < 0:
                        continue
                    p = z.softmax(-1)
                    residual, h = torch.eye(self.outputs, dtype=F64)[label] - p, torch.diag(p) - torch.outer(p, p)
                score += jacobian.T @ residual
                information += jacobian.T @ h @ jacobian
                counts += 1
                sequences.add(i)
        return score, information, counts, len(sequences)
