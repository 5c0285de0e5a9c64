"""Distributions that Pyro does not have. All log-probabilities are in nats.

:class:`Gaussian` is Pyro's Normal, with a scale that stays small and a KL that keeps its digits.

:class:`DiscretizedNormal` is the normal law rounded to a regular grid. Images are integers, so that the last step of a
diffusion model has to give *probabilities* to pixel levels: DDPM's discretised decoder (Ho et al. 2020, eq. 13,
https://arxiv.org/abs/2006.11239), an idea from the discretised logistic of PixelCNN++ (Salimans et al. 2017,
https://arxiv.org/abs/1701.05517).

How the log-mass of a bin is computed
    With ``z = (x - loc) / scale`` and ``d = bin_width / (2 * scale)`` the mass of an interior bin
    is ``Phi(z + d) - Phi(z - d)``. The obvious ``log(cdf - cdf)`` is ``log(0)`` with NaN gradients
    for a third of realistic float32 inputs, so three forms are used, each where it is exact:

    * *narrow bins*, ``d * (|z| + 1) < 1/2``: ``phi(z) * 2d`` times the mean of
      ``exp(-z d t - d^2 t^2 / 2)`` over ``t`` in [-1, 1] by 8-node Gauss-Legendre quadrature, whose
      error there is below 1e-16;
    * *other interior bins*, reflected so that both edges ``near > far`` lie in the lower tail:
      ``log Phi(near) + log(1 - exp(-D))``, ``D = log Phi(near) - log Phi(far)``. In the tail the
      quadratic parts of ``D`` are subtracted in closed form (``2 |z| d``): their float32
      difference would be noise;
    * *the outermost bins*, which reach to infinity: one ``log Phi``.

    Gradients are closed forms written beside the values instead of left to autograd, for two
    reasons. The float32 gradient of ``torch.special.log_ndtr`` is wrong in the tails (4 % at
    z = -1000, a factor 6.5 at -10,000, zero at -1,000,000), and only the inputs have to be kept
    for the backward pass. The closed forms are ordinary differentiable operations, so higher
    derivatives work too.
"""

from __future__ import annotations

import math
import struct
from typing import Any, ClassVar

import torch
from pyro.distributions import Normal, TorchDistribution
from pyro.ops.provenance import extract_provenance, track_provenance
from torch import Tensor
from torch.distributions import constraints, register_kl
from torch.distributions.utils import broadcast_all
from torch.types import _size

from pyrodiff.errors import OptionError, ShapeError, check_option

__all__ = ["DiscretizedNormal", "Gaussian", "OnGrid"]

_CDF_RULES = ("exact", "tanh")
_SQRT_HALF = math.sqrt(0.5)
_SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)
_INV_SQRT_2PI = 1.0 / math.sqrt(2.0 * math.pi)
_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)

# Positive nodes and weights of 8-point Gauss-Legendre quadrature (Abramowitz & Stegun table 25.4).
# The rule is symmetric: four pairs, and the weights of the four add up to 1, so a weighted sum is
# the mean over [-1, 1].
_GAUSS_LEGENDRE = (
    (0.1834346424956498049, 0.3626837833783619830),
    (0.5255324099163289858, 0.3137066458778872873),
    (0.7966664774136267396, 0.2223810344533744705),
    (0.9602898564975362317, 0.1012285362903762591),
)

# The cubic of the tanh approximation, and its clamp and edge rule, are those of
# openai/guided-diffusion (losses.py). Its edges are |x| > 0.999 for bins of 2/255: 0.1275 bins in.
_TANH_CUBIC = 0.044715
_TANH_CLAMP = 1e-12
_TANH_EDGE_BINS = 0.1275


class Gaussian(Normal):
    """A Normal whose scale is not expanded to the shape of its loc.

    A diffusion's scale is one number per example, its loc a whole image: logarithms and quotients of the scale then cost
    nothing, and the KL of nearly equal Gaussians keeps its digits, where torch's float32 one is 0 for means 1e-4 standard
    deviations apart. The density is exactly Normal's, so that ``isinstance`` and KLs registered for Normal stay right.

    Args:
        loc: mean, any shape.
        scale: standard deviation, positive, of a shape that broadcasts with that of loc.

    The parameters are not checked: those made here are right by construction, and looking would wait for the device.
    """

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        self.loc, self.scale = loc, scale
        shape = torch.broadcast_tensors(loc, scale)[0].shape  # views; torch.broadcast_shapes is ten times slower
        super(torch.distributions.Normal, self).__init__(shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """The loc, ``[*batch]``."""
        return self.loc.expand(self.batch_shape)

    @property
    def mode(self) -> Tensor:
        """The loc, ``[*batch]``."""
        return self.mean

    @property
    def stddev(self) -> Tensor:
        """The scale, ``[*batch]``."""
        return self.scale.expand(self.batch_shape)

    @property
    def variance(self) -> Tensor:
        """The scale's square, ``[*batch]``."""
        return self.scale.square().expand(self.batch_shape)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Gaussian:
        """This law with its batch shape expanded; no memory is copied."""
        return Gaussian(self.loc.expand(batch_shape), self.scale)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """``loc + scale * noise``, ``[*sample_shape, *batch]``, through which gradients flow."""
        noise = torch.randn(
            self._extended_shape(torch.Size(sample_shape)), dtype=self.loc.dtype, device=self.loc.device
        )
        return torch.addcmul(self.loc, self.scale, noise)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """:meth:`rsample` without gradient."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density, nats, of the broadcast shape."""
        z = (value - self.loc) / self.scale
        return z.square().mul_(-0.5).sub_(self.scale.log() + _HALF_LOG_2PI)

    def entropy(self) -> Tensor:
        """Entropy, nats, ``[*batch]``."""
        return (self.scale.log() + 0.5 + _HALF_LOG_2PI).expand(self.batch_shape)


@register_kl(torch.distributions.Normal, Gaussian)
@register_kl(Gaussian, torch.distributions.Normal)
@register_kl(Gaussian, Gaussian)
def _kl_gaussian_gaussian(q: torch.distributions.Normal, p: torch.distributions.Normal) -> Tensor:
    r""":math:`\frac12 (e^d - 1 - d) + \frac12 (\mu_q - \mu_p)^2 / \sigma_p^2` with :math:`d = \log(\sigma_q^2 / \sigma_p^2)`."""
    # In float64, which for a scale shared by a whole image costs nothing: where both variances are nearly equal the quotient
    # has lost what its logarithm is about, and the terms cancel. So log1p there, and the series to d^7.
    q_scale, p_scale = q.scale.double(), p.scale.double()
    gap = (q_scale - p_scale) / p_scale
    small = gap.abs() < 0.005
    log_ratio = 2 * torch.where(small, torch.log1p(torch.where(small, gap, 0.0)), (q_scale / p_scale).log())
    d = torch.where(small, log_ratio, 0.0)
    series = d * d * (1 / 2 + d * (1 / 6 + d * (1 / 24 + d * (1 / 120 + d * (1 / 720 + d / 5040)))))
    by_variance = torch.where(small, series, torch.expm1(log_ratio) - log_ratio)
    by_mean = ((q.loc - p.loc) / p.scale).square()
    return (by_mean + by_variance.to(by_mean.dtype)).mul_(0.5)


def _round_to(value: float, dtype: torch.dtype) -> float:
    """``value`` rounded to float32 where ``dtype`` is, without making a tensor (no device)."""
    if dtype == torch.float32:
        return struct.unpack("f", struct.pack("f", value))[0]
    return value


def _quadrature(y: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means over t in [-1, 1] of w, t*w and t^2*w, for w = exp(-y d t - d^2 t^2 / 2).

    The sign of the middle one is that of y. A loop over four pairs of nodes, because a trailing
    axis of eight would multiply the memory by eight at image sizes.
    """
    yd, minus_half_d2 = y * d, -0.5 * d * d
    mass = first = second = torch.zeros_like(y)
    for node, weight in _GAUSS_LEGENDRE:
        gauss = weight * torch.exp((node * node) * minus_half_d2)
        even = gauss * torch.cosh(node * yd)
        mass = mass + even
        first = first + node * (gauss * torch.sinh(node * yd))
        second = second + (node * node) * even
    return mass, first, second


class _Bin:
    """What the value and the gradients of a bin's log-mass share; all tensors of one shape.

    Every branch sees inputs replaced by harmless ones where it is not selected: ``torch.where``
    alone would let the NaN of an unselected branch into second derivatives.
    """

    def __init__(
        self,
        c: Tensor,
        c_low: Tensor,
        scale: Tensor,
        is_lowest: Tensor,
        is_highest: Tensor,
        half: tuple[float, float],
    ) -> None:
        h, h_low = half
        # +1 or -1, never 0: second derivatives at c = 0 need the one-sided sign.
        keep = is_lowest | (~is_highest & (c < 0))
        self.sign = torch.where(keep, 1.0, -1.0).to(c.dtype)
        reflected = self.sign * c
        y, d = -reflected / scale, h / scale
        self.interior = ~(is_lowest | is_highest)
        self.narrow = self.interior & (d * (y + 1.0) < 0.5)
        wide = self.interior & ~self.narrow

        self.y_narrow = torch.where(self.narrow, y, 0.0)
        self.d_narrow = torch.where(self.narrow, d, 0.25)
        # y - 1 without the rounding of y: the gradient by scale vanishes near y = 1.
        excess = ((-reflected - scale) - self.sign * c_low) / scale
        self.y_minus_1 = torch.where(self.narrow, excess, -1.0)

        self.moments = _quadrature(self.y_narrow, self.d_narrow)

        # The edge is a small difference of c and h when the mean lies near it, and is divided by
        # a possibly tiny scale: the rounding errors of both are added back.
        near = ((reflected + h) + (self.sign * c_low + h_low)) / scale
        self.near = torch.where(self.narrow, -1.0, near)
        self.far = torch.where(wide, (reflected - h) / scale, -2.0)
        self.two_yd = torch.where(wide, 2.0 * y * d, 1.0)

        # Phi(near) is erfcx(-near / sqrt 2) / 2 * exp(-near^2 / 2) below 0 and 1 - upper above.
        self.below = self.near <= 0
        self.tail = torch.special.erfcx(-_SQRT_HALF * self.near.clamp(max=0.0))
        self.upper = 0.5 * torch.special.erfc(_SQRT_HALF * self.near.clamp(min=0.0))
        self.log_ndtr = torch.where(
            self.below,
            torch.log(0.5 * self.tail) - 0.5 * self.near.square(),
            torch.log1p(-self.upper),
        )
        far_tail = torch.special.erfcx(-_SQRT_HALF * self.far)
        self.gap = torch.where(
            self.below,
            self.two_yd + torch.log(self.tail / far_tail),
            self.log_ndtr + 0.5 * self.far.square() - torch.log(0.5 * far_tail),
        )

    def log_mass(self) -> Tensor:
        """Log of the bin's probability, nats."""
        mass, _, _ = self.moments
        narrow = torch.log(2.0 * self.d_narrow * mass) - _HALF_LOG_2PI - 0.5 * self.y_narrow.square()
        # gap >= 0.8 wherever it is used, so log1p(-exp()) is the accurate half of log1mexp.
        wide = self.log_ndtr + torch.where(self.interior, torch.log1p(-torch.exp(-self.gap)), 0.0)
        return torch.where(self.narrow, narrow, wide)

    def derivatives(self) -> tuple[Tensor, Tensor]:
        """``scale * d/dc`` and ``scale * d/dscale`` of the log-mass (both without unit)."""
        y, d = self.y_narrow, self.d_narrow
        mass, first, second = self.moments
        narrow_c = y - d * first / mass
        curvature = d * (2.0 * y * first - d * second) / mass
        narrow_scale = self.y_minus_1 * (y + 1.0) - curvature

        hazard = torch.where(
            self.below,
            _SQRT_2_OVER_PI / self.tail,
            _INV_SQRT_2PI * torch.exp(-0.5 * self.near.square()) / (1.0 - self.upper),
        )
        # phi(near) / mass and phi(far) / phi(near). The outermost bins have no far edge.
        density = torch.where(self.interior, hazard / -torch.expm1(-self.gap), hazard)
        minus_ratio_m1 = torch.where(self.interior, -torch.expm1(-self.two_yd), 1.0)
        ratio = torch.where(self.interior, torch.exp(-self.two_yd), 0.0)
        wide_c = density * minus_ratio_m1
        wide_scale = density * (self.far * ratio - self.near)

        by_c = self.sign * torch.where(self.narrow, narrow_c, wide_c)
        return by_c, torch.where(self.narrow, narrow_scale, wide_scale)


class _LogBinMass(torch.autograd.Function):
    """Log-mass of bins as a function of ``c = x - loc`` and ``scale``, see the module docstring.

    The scaled first derivatives are further outputs, without gradient: they share the expensive
    functions with the value, so the backward pass is two products. It computes them again only
    when it is itself to be differentiated.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        c: Tensor,
        c_low: Tensor,
        scale: Tensor,
        is_lowest: Tensor,
        is_highest: Tensor,
        half: tuple[float, float],
    ) -> tuple[Tensor, Tensor, Tensor]:
        bins = _Bin(c, c_low, scale, is_lowest, is_highest, half)
        return bins.log_mass(), *bins.derivatives()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.half = inputs
        _, by_c, by_scale = output
        ctx.mark_non_differentiable(by_c, by_scale)
        ctx.save_for_backward(*tensors, by_c, by_scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        c, c_low, scale, is_lowest, is_highest, by_c, by_scale = ctx.saved_tensors
        if torch.is_grad_enabled():
            bins = _Bin(c, c_low, scale, is_lowest, is_highest, ctx.half)
            by_c, by_scale = bins.derivatives()
        return grad * by_c / scale, None, grad * by_scale / scale, None, None, None


def _tanh_cdf(z: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.tanh(_SQRT_2_OVER_PI * (z + _TANH_CUBIC * z**3)))


def _tanh_icdf(u: Tensor) -> Tensor:
    """Inverse of :func:`_tanh_cdf`: the real root of the cubic, by its hyperbolic form."""
    target = 0.5 * torch.logit(u) / _SQRT_2_OVER_PI
    k = math.sqrt(3.0 * _TANH_CUBIC)
    return (2.0 / k) * torch.sinh(torch.asinh(1.5 * k * target) / 3.0)


class OnGrid(constraints.Constraint):
    """The points low, low + bin_width, ..., high, within rounding.

    A value passes when it is nearer to a grid point than 1/1000 of a bin plus the rounding error
    of its own dtype (at most a quarter of a bin): float32 cannot hold most multiples of 2/255.

    Args:
        low: Lowest point.
        high: Highest point.
        levels: Number of points, at least 2.
    """

    is_discrete = True
    event_dim = 0

    def __init__(self, low: float, high: float, levels: int) -> None:
        self.low, self.high, self.levels = low, high, levels
        super().__init__()

    @property
    def bin_width(self) -> float:
        """Distance between neighbouring points."""
        return (self.high - self.low) / (self.levels - 1)

    def index(self, value: Tensor) -> Tensor:
        """Real-valued position on the grid, 0 at ``low`` and ``levels - 1`` at ``high``."""
        return (value - self.low) / self.bin_width

    def points(self, index: Tensor) -> Tensor:
        """The grid points at integer positions ``index`` (a floating tensor), in its dtype.

        Mixing the two ends rounds once less than ``low + index * bin_width``: on [-1, 1] the
        points are the correctly rounded ones.
        """
        top = self.levels - 1
        mixed = (self.low * (top - index) + self.high * index) / top
        return mixed.clamp(min=self.low, max=self.high)

    def check(self, value: Tensor) -> Tensor:
        """Boolean tensor of ``value``'s shape: which elements lie on the grid."""
        slack = 1e-3
        if value.is_floating_point():
            eps = torch.finfo(value.dtype).eps
            slack += eps * max(abs(self.low), abs(self.high)) / self.bin_width
        position = self.index(_at_least_float32(value))
        nearest = position.round().clamp(min=0, max=self.levels - 1)
        return (position - nearest).abs() <= min(slack, 0.25)

    def __repr__(self) -> str:
        return f"OnGrid(low={self.low:g}, high={self.high:g}, levels={self.levels})"


def _at_least_float32(value: Tensor) -> Tensor:
    if value.is_floating_point() and value.dtype.itemsize >= 4:
        return value
    return value.to(torch.float32)


def _as_float(name: str, value: float | Tensor) -> float:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ShapeError(f"{name} has shape {tuple(value.shape)}; it must be a scalar")
        value = value.detach()
    number = float(value)
    if not math.isfinite(number):
        raise OptionError(f"{name}={number!r} is not a finite number")
    return number


class DiscretizedNormal(TorchDistribution):
    r"""The law of a normal variable rounded to the nearest point of a regular grid.

    The grid is ``low, low + bin_width, ..., high``. ``low`` and ``high`` are the outermost bin
    *centres*, and the outermost bins extend to minus and plus infinity:

    .. math::
        p(x) = \Phi\big((x + w/2 - \mu)/\sigma\big) - \Phi\big((x - w/2 - \mu)/\sigma\big),

    with the first term 1 at ``x = high`` and the second 0 at ``x = low``, so the probabilities add
    up to 1. This is DDPM's decoder (eq. 13 of https://arxiv.org/abs/2006.11239).

    ``log_prob`` and its gradients are finite and accurate in the tails: relative to
    ``1 + |log p|`` the value is right to 1e-6 in float32 and 1e-14 in float64.

    It is not a subclass of ``Normal``, because Pyro and torch look up KL divergences by
    inheritance and would give the one between densities.

    Args:
        loc: Mean of the underlying normal, any shape ``[*batch]``.
        scale: Its standard deviation, positive, broadcastable with ``loc``.
        bin_width: Distance between grid points, in the units of ``loc``; a float or a scalar
            tensor. ``(high - low) / bin_width`` must be a whole number.
        low: Lowest bin centre; a float or a scalar tensor.
        high: Highest bin centre; a float or a scalar tensor. Tensors on an accelerator cost one
            synchronisation each at construction: pass floats.
        cdf: ``"exact"``, or ``"tanh"`` for openai/guided-diffusion's approximation
            ``(1 + tanh(sqrt(2/pi) (z + 0.044715 z^3))) / 2`` with its clamp of probabilities at
            1e-12. The latter is there to reproduce that code's numbers and nothing else: for
            outliers the clamp returns -27.6 nats where the truth may be thousands lower, with zero
            gradient, so an ELBO made of it is not a bound.
        validate_args: Whether to check arguments and values (both synchronise an accelerator).
            Default: torch's global setting.

    Half-precision ``loc`` and ``scale`` are converted to float32, and so are the results. Values
    in half precision are moved to the nearest grid point, because bfloat16 cannot hold the 8-bit
    grid.

    Raises:
        OptionError: If ``bin_width`` is not positive, ``low >= high``, they do not form a grid,
            or ``cdf`` is unknown.
        ShapeError: If ``bin_width``, ``low`` or ``high`` is a tensor of more than one element.
        ValueError: (torch's) with validation on, if ``loc`` is not a number, ``scale`` not
            positive, or a value given to ``log_prob`` not on the grid.

    Example:
        >>> d = DiscretizedNormal(torch.zeros(3), torch.ones(3), 2 / 255, -1.0, 1.0).to_event(1)
        >>> d.log_prob(torch.tensor([-1.0, 1 / 255, 1.0])).shape
        torch.Size([])
    """

    arg_constraints: ClassVar = {"loc": constraints.real, "scale": constraints.positive}
    has_rsample = False
    has_enumerate_support = True

    def __init__(
        self,
        loc: Tensor | float,
        scale: Tensor | float,
        bin_width: float | Tensor,
        low: float | Tensor,
        high: float | Tensor,
        *,
        cdf: str = "exact",
        validate_args: bool | None = None,
    ) -> None:
        check_option("cdf", cdf, _CDF_RULES)
        width = _as_float("bin_width", bin_width)
        bottom, top = _as_float("low", low), _as_float("high", high)
        if width <= 0:
            raise OptionError(f"bin_width={width!r} is not positive")
        if bottom >= top:
            raise OptionError(f"low={bottom!r} is not below high={top!r}")
        steps = (top - bottom) / width
        # 1e-6 lets a float32 bin_width pass and is far too small for a miscounted grid.
        if round(steps) < 1 or abs(steps - round(steps)) > 1e-6 * steps:
            raise OptionError(
                f"bin_width={width!r} does not divide high - low = {top - bottom!r} into a whole "
                f"number of bins ({steps:.6g})"
            )
        loc, scale = broadcast_all(loc, scale)
        dtype = torch.promote_types(loc.dtype, scale.dtype)
        if not dtype.is_floating_point or dtype.itemsize < 4:
            dtype = torch.float32
        self.loc, self.scale = loc.to(dtype), scale.to(dtype)
        self.cdf_rule = cdf
        self._grid = OnGrid(bottom, top, round(steps) + 1)
        super().__init__(self.loc.shape, validate_args=validate_args)

    @property
    def low(self) -> float:
        """Lowest bin centre."""
        return self._grid.low

    @property
    def high(self) -> float:
        """Highest bin centre."""
        return self._grid.high

    @property
    def levels(self) -> int:
        """Number of grid points."""
        return self._grid.levels

    @property
    def bin_width(self) -> float:
        """Distance between grid points, ``(high - low) / (levels - 1)``."""
        return self._grid.bin_width

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> OnGrid:
        """The grid, as a constraint."""
        return self._grid

    def expand(self, batch_shape: _size, _instance: DiscretizedNormal | None = None) -> DiscretizedNormal:
        """This law with its batch shape expanded to ``batch_shape``; no memory is copied."""
        new = self._get_checked_instance(DiscretizedNormal, _instance)
        batch_shape = torch.Size(batch_shape)
        new.loc, new.scale = self.loc.expand(batch_shape), self.scale.expand(batch_shape)
        new.cdf_rule, new._grid = self.cdf_rule, self._grid
        super(DiscretizedNormal, new).__init__(batch_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of grid points, in nats.

        Args:
            value: Grid points, shape broadcastable with ``[*batch]``, any real dtype.

        Returns:
            Tensor of the broadcast shape, in float32 or better.

        Raises:
            ValueError: With validation on, if an element is not on the grid.
        """
        if self._validate_args:
            self._validate_sample(value)
        dtype = self.loc.dtype
        if value.is_floating_point() and value.dtype.itemsize < 4:
            x = self.snap(value.to(dtype))
        else:
            dtype = torch.promote_types(dtype, value.dtype)
            x = value.to(dtype)
        loc, scale = self.loc.to(dtype), self.scale.to(dtype)
        if self.cdf_rule == "tanh":
            return self._tanh_log_prob(x, loc, scale)

        c, scale = torch.broadcast_tensors(x - loc, scale)
        with torch.no_grad():
            # Knuth's two-sum: exactly what the subtraction rounded away.
            b = c - x
            c_low = (x - (c - b)) - (loc + b)
        half = 0.5 * self.bin_width
        head = _round_to(half, dtype)
        is_lowest = (x < self.low + half).expand(c.shape)
        is_highest = (x > self.high - half).expand(c.shape)
        inputs = (c, c_low, scale, is_lowest, is_highest, (head, half - head))
        if torch.is_grad_enabled() and (c.requires_grad or scale.requires_grad):
            # TraceGraph_ELBO marks tensors by a subclass that would lose the gradient in an autograd.Function.
            plain: Any
            plain, provenance = extract_provenance(inputs)
            return track_provenance(_LogBinMass.apply(*plain)[0], provenance)
        return _Bin(*inputs).log_mass()

    def _tanh_log_prob(self, x: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        c, inverse, half = x - loc, scale.reciprocal(), 0.5 * self.bin_width
        cdf_plus, cdf_min = _tanh_cdf(inverse * (c + half)), _tanh_cdf(inverse * (c - half))
        edge = _TANH_EDGE_BINS * self.bin_width
        mass = torch.where(
            x < self.low + edge,
            cdf_plus,
            torch.where(x > self.high - edge, 1.0 - cdf_min, cdf_plus - cdf_min),
        )
        return torch.log(mass.clamp(min=_TANH_CLAMP))

    def snap(self, value: Tensor) -> Tensor:
        """The grid points nearest to ``value``, in its shape and dtype."""
        index = self._grid.index(value).round().clamp(min=0, max=self.levels - 1)
        return self._grid.points(index)

    def sample(self, sample_shape: _size = ()) -> Tensor:
        """Draw grid points: the underlying law rounded to the grid and clamped to it.

        With ``cdf="tanh"`` the underlying law is the one whose CDF is the tanh approximation, so
        that draws and ``log_prob`` agree.

        Args:
            sample_shape: Shape of the set of independent draws.

        Returns:
            Tensor ``[*sample_shape, *batch]``, without gradient.
        """
        shape = self._extended_shape(sample_shape)
        with torch.no_grad():
            if self.cdf_rule == "exact":
                noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
            else:
                uniform = torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device)
                noise = _tanh_icdf(uniform)
            return self.snap(self.loc + self.scale * noise)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All grid points along a new leftmost dimension.

        Args:
            expand: Whether to expand over the batch dimensions instead of leaving ones.

        Returns:
            Tensor ``[levels, *batch]``, or ``[levels, 1, ..., 1]`` with ``expand=False``.
        """
        index = torch.arange(self.levels, dtype=self.loc.dtype, device=self.loc.device)
        points = self._grid.points(index).reshape((-1,) + (1,) * len(self.batch_shape))
        return points.expand((-1, *self.batch_shape)) if expand else points

    def pmf(self) -> Tensor:
        """Probabilities of all grid points, shape ``[*batch, levels]``; differentiable.

        It holds ``levels`` numbers per element: for 8-bit data, 256 times the memory of ``loc``.
        """
        points = self.enumerate_support(expand=False).movedim(0, -1)
        each = DiscretizedNormal(
            self.loc.unsqueeze(-1),
            self.scale.unsqueeze(-1),
            self.bin_width,
            self.low,
            self.high,
            cdf=self.cdf_rule,
            validate_args=False,
        )
        return each.log_prob(points).exp()

    @property
    def mean(self) -> Tensor:
        """Exact mean of the rounded variable, shape ``[*batch]``; costs as much as :meth:`pmf`."""
        return (self.pmf() * self._points_last()).sum(-1)

    @property
    def variance(self) -> Tensor:
        """Exact variance of the rounded variable, shape ``[*batch]``, cost as :meth:`pmf`."""
        pmf, points = self.pmf(), self._points_last()
        mean = (pmf * points).sum(-1, keepdim=True)
        return (pmf * (points - mean).square()).sum(-1)

    def _points_last(self) -> Tensor:
        return self.enumerate_support(expand=False).reshape(-1)

    def __repr__(self) -> str:
        rule = "" if self.cdf_rule == "exact" else f", cdf={self.cdf_rule!r}"
        return (
            f"DiscretizedNormal(loc: {tuple(self.loc.shape)}, scale: {tuple(self.scale.shape)}, "
            f"low={self.low:g}, high={self.high:g}, levels={self.levels}{rule})"
        )
