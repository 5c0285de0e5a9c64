"""Embeddings of the noise level and of class labels.

A network of this library is told the noise level as the log-SNR
``log(alpha_t^2 / sigma_t^2)``, which does not depend on the number of steps. Networks trained
elsewhere want the integer index of a step; :class:`ConditionEmbedding` translates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyrodiff.errors import OptionError, ShapeError, check_option

__all__ = ["ConditionEmbedding", "index_features", "interpolate_index", "log_snr_features"]

# Wavelengths of the log-SNR sinusoids, in nats. Over the log-SNRs met in practice, [-15, 15], the
# longest is monotone and nearly linear; the shortest resolves neighbouring steps of a long chain
# and is still smooth at the spacing of a short one.
_LONGEST, _SHORTEST = 128.0, 1.0


def log_snr_features(log_snr: Tensor, features: int) -> Tensor:
    """Return sinusoids of the log-SNR at geometrically spaced wavelengths of 1 to 128 nats.

    Args:
        log_snr: finite tensor of shape [N], in nats.
        features: number of features, even.

    Returns:
        Tensor of shape [N, features]: cosines, then sines; float32, or float64 for float64 input.
    """
    dtype = torch.promote_types(log_snr.dtype, torch.float32)
    steps = torch.arange(features // 2, dtype=dtype, device=log_snr.device)
    rate = -math.log(_LONGEST / _SHORTEST) / max(features // 2 - 1, 1)
    frequencies = (2 * math.pi / _SHORTEST) * torch.exp(rate * steps)
    phase = log_snr.to(dtype)[:, None] * frequencies
    return torch.cat([phase.cos(), phase.sin()], dim=1)


def index_features(index: Tensor, features: int, shift: float = 0.0) -> Tensor:
    """Return the sinusoids of a timestep index that guided-diffusion's networks were trained with.

    The wavelengths are 2 pi to 20000 pi steps, as in "Attention Is All You Need" (Vaswani et al.,
    2017), https://arxiv.org/abs/1706.03762, and "Denoising Diffusion Probabilistic Models" (Ho et
    al., 2020), https://arxiv.org/abs/2006.11239.

    Args:
        index: real or integer tensor of shape [N], in steps.
        features: number of features, even.
        shift: frequency i is ``10000 ** (-i / (features / 2 - shift))``: 0 in guided-diffusion,
            1 in the networks of Ho et al.

    Returns:
        Float32 tensor of shape [N, features]: cosines, then sines.
    """
    half = features // 2
    # Float32 throughout, as the published networks saw it: at index 1000 a more precise phase
    # would differ from theirs by up to 1e-4.
    steps = torch.arange(half, dtype=torch.float32, device=index.device)
    frequencies = torch.exp(-math.log(10000.0) * steps / (half - shift))
    phase = index.float()[:, None] * frequencies
    return torch.cat([phase.cos(), phase.sin()], dim=1)


def interpolate_index(log_snr: Tensor, table: Tensor) -> Tensor:
    """Return the position of each log-SNR in a decreasing table.

    Exact at the entries, linear between them, and clamped to the first and last position outside.

    Args:
        log_snr: tensor of shape [N], in nats.
        table: float32 tensor of shape [K], strictly decreasing, K >= 2.

    Returns:
        Float32 tensor of shape [N] with values in [0, K - 1].
    """
    log_snr = log_snr.float()
    # searchsorted wants an increasing sequence.
    upper = torch.searchsorted(-table, -log_snr.detach()).clamp(1, len(table) - 1)
    lower = upper - 1
    start, stop = table[lower], table[upper]
    return lower + ((log_snr - start) / (stop - start)).clamp(0, 1)


class ConditionEmbedding(nn.Module):
    """Embed the noise level and, optionally, a class label into one vector per example.

    Sinusoidal features pass through a two-layer perceptron and the label's embedding is added, as
    in "Diffusion Models Beat GANs on Image Synthesis" (Dhariwal & Nichol, 2021),
    https://arxiv.org/abs/2105.05233.

    Args:
        features: number of sinusoidal features, even.
        width: size of the embedding.
        classes: number of class labels, or None for a network without labels.
        label_dropout: probability with which training replaces a label by the null class, which is label ``classes``
            and there if this is not 0.
        time_embedding: ``"sinusoidal"`` (of the log-SNR), ``"index"`` (of a step index) or
            ``"learned"`` (a row of features per step, parameters).
        log_snr_table: for ``"index"`` and ``"learned"``: the log-SNR of each step of the network's
            own chain, least noisy first; entry i is the network's index ``i * index_step``. None:
            the network can only be called with ``index=``.
        index_step: for ``"index"`` and ``"learned"``: distance of neighbouring entries of the table.
        index_shift: for ``"index"``: see :func:`index_features`.

    Attributes:
        null_cond: the conditioning that says nothing: ``{"y": classes}``, or ``{}`` without null class.

    Raises:
        OptionError: an argument is outside its range.
    """

    def __init__(
        self,
        features: int,
        width: int,
        *,
        classes: int | None = None,
        label_dropout: float = 0.0,
        time_embedding: str = "sinusoidal",
        log_snr_table: Sequence[float] | None = None,
        index_step: float = 1.0,
        index_shift: float = 0.0,
    ) -> None:
        super().__init__()
        check_option("time_embedding", time_embedding, ("sinusoidal", "index", "learned"))
        if features < 2 or features % 2:
            raise OptionError(f"width={features} is not a positive even number")
        if classes is not None and classes < 1:
            raise OptionError(f"classes={classes} is not a positive number or None")
        if not 0 <= label_dropout < 1:
            raise OptionError(f"label_dropout={label_dropout} is not in [0, 1)")
        if label_dropout and classes is None:
            raise OptionError(f"label_dropout={label_dropout} needs classes: there are no labels to drop")
        if log_snr_table is not None and time_embedding == "sinusoidal":
            raise OptionError(f"log_snr_table needs time_embedding='index', not {time_embedding!r}")
        if log_snr_table is None and time_embedding == "learned":
            raise OptionError("time_embedding='learned' needs a log_snr_table: it has a row per entry")
        if not index_shift < features // 2:
            raise OptionError(f"index_shift={index_shift} is not below half of width={features}")
        self.features = features
        self.classes = classes
        self.label_dropout = label_dropout
        self.null_cond = {"y": classes} if classes is not None and label_dropout else {}
        self.time_embedding = time_embedding
        self.index_step = index_step
        self.index_shift = index_shift
        self.hidden = nn.Linear(features, width)
        self.output = nn.Linear(width, width)
        self.label = None if classes is None else nn.Embedding(classes + bool(label_dropout), width)
        self._log_snrs: tuple[float, ...] = ()
        self._table: Tensor | None = None
        if log_snr_table is not None:
            self._log_snrs = tuple(map(float, log_snr_table))
            table = torch.tensor(self._log_snrs, dtype=torch.float32, device="cpu")
            if len(table) < 2 or not bool((table[1:] < table[:-1]).all() & table.isfinite().all()):
                raise OptionError("log_snr_table is not a strictly decreasing list of 2 or more finite numbers")
            self._table = self._table_on(self.hidden.weight.device)
        self.rows = nn.Embedding(len(self._log_snrs), features) if time_embedding == "learned" else None

    def _table_on(self, device: torch.device) -> Tensor:
        if self._table is None or self._table.device != device:
            self._table = torch.tensor(self._log_snrs, dtype=torch.float32, device=device)
        return self._table

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> ConditionEmbedding:
        # The table follows the parameters to their device but not to their dtype (bfloat16 would
        # merge entries), and `to_empty` must not leave it without values. Hence it is no buffer,
        # and not in the state dict either: the constructor's arguments carry it.
        super()._apply(fn, recurse)
        if self._log_snrs:
            self._table_on(self.hidden.weight.device)
        return self

    def time_features(self, x: Tensor, log_snr: Tensor | None, index: Tensor | None = None) -> Tensor:
        """Return what the perceptron sees of the noise level, of shape [N, features]; arguments as :meth:`forward`."""
        if index is not None:
            if self.time_embedding == "sinusoidal":
                raise OptionError(f"index= needs time_embedding='index', not {self.time_embedding!r}")
            if log_snr is not None:
                raise OptionError("log_snr and index= are both given: give one")
            _check_per_example("index", index, x)
            return self._index_features(index)
        if log_snr is None:
            raise OptionError("log_snr is missing")
        _check_per_example("log_snr", log_snr, x)
        if not log_snr.is_floating_point():
            raise ShapeError(f"log_snr has dtype {log_snr.dtype}, not a floating-point one")
        if self.time_embedding == "sinusoidal":
            return log_snr_features(log_snr, self.features)
        if not self._log_snrs:
            raise OptionError("log_snr cannot be used without a log_snr_table: give index=")
        return self._index_features(self.index_step * interpolate_index(log_snr, self._table_on(log_snr.device)))

    def _index_features(self, index: Tensor) -> Tensor:
        if self.rows is None:
            return index_features(index, self.features, self.index_shift)
        position = index / self.index_step
        lower = position.floor().long()
        upper = (lower + 1).clamp(max=self.rows.num_embeddings - 1)
        rows = self.rows(lower)
        return torch.lerp(rows, self.rows(upper), (position - lower).to(rows.dtype)[:, None])

    def forward(
        self,
        x: Tensor,
        log_snr: Tensor | None = None,
        index: Tensor | None = None,
        y: Tensor | None = None,
    ) -> Tensor:
        """Return the embedding, already passed through SiLU because every consumer wants it so.

        Args:
            x: the network's input, of shape [N, ...]; only its N and dtype are used.
            log_snr: floating-point tensor of shape [N], in nats.
            index: instead of ``log_snr``: step indices, tensor of shape [N].
            y: class labels, integer tensor of shape [N]. In training mode each is replaced by the null class with
                probability ``label_dropout``, independently (torch's generator of the labels' device).

        Returns:
            Tensor of shape [N, width].

        Raises:
            OptionError: an input is missing, or given to a network that cannot use it; or a label that there is not.
            ShapeError: an input is not of shape [N], or of the wrong kind of number.
        """
        if (y is None) != (self.label is None):
            raise OptionError(
                f"y is missing: the network has classes={self.classes}"
                if y is None
                else "y is given, but the network has classes=None"
            )
        features = self.time_features(x, log_snr, index).to(x.dtype)
        embedding = self.output(F.silu(self.hidden(features)))
        if y is not None and self.label is not None:
            _check_per_example("y", y, x)
            if y.is_floating_point() or y.dtype == torch.bool:
                raise ShapeError(f"y has dtype {y.dtype}, not an integer one")
            if self.training and self.null_cond:
                dropped = torch.rand(y.shape, device=y.device) < self.label_dropout
                y = y.masked_fill(dropped, self.null_cond["y"])
            try:  # looking at y beforehand would wait for a device; a CUDA one asserts on its own
                embedding = embedding + self.label(y)
            except IndexError:
                raise OptionError(
                    f"y has values in {int(y.min())}..{int(y.max())}; labels are in 0..{self.label.num_embeddings - 1}"
                ) from None
        return F.silu(embedding)


def _check_per_example(name: str, value: Tensor, x: Tensor) -> None:
    if value.shape != x.shape[:1]:
        raise ShapeError(f"{name} has shape {list(value.shape)}, not {list(x.shape[:1])}: one value per example")
