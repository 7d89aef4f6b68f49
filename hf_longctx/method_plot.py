"""A method as a picture, without a model: biases by distance, scaled logits, position vectors, frequencies, coverage."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_longctx.method import Frequencies, Method, Shape
from hf_longctx.schema import format_size

if TYPE_CHECKING:
    from torch import Tensor

HEAD_DIM, HIDDEN, WINDOW, THETA = 128, 256, 4096, 10000.0  # hidden: more columns cannot be told apart in a picture
MASS = 0.99  # of the kernel, within the receptive field
_SAMPLES = 800  # points of a curve


def plot_method(method: Method, path: str | Path, *, heads: int = 32, length: int = 131072) -> dict[str, Any]:
    """Draw a method as it is before training, for a model of a common size: head dimension 128, trained window 4k, theta 10,000.

    Args:
        method: what to draw; of several slots, the first that has a picture.
        path: the .png to write; replaced if it is there.
        heads: attention heads of the model.
        length: how far to draw, in tokens. A sampler's target and the positions of a `length` field come first.

    Returns:
        The numbers of the picture: method, slot, shape, length, and for a bias `receptive_field`, one distance a head or None.

    Raises:
        ValueError: a path that cannot be written, a slot without a picture, or a method that does not fit the shape.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path}: pictures are PNG; give a name that ends in .png")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{path} cannot be written: there is no folder {path.parent}")
    if length < 2 or heads < 1:
        raise ValueError(f"a picture needs at least 1 head and 2 distances, got {heads} and {length}")
    slot = next((slot for slot in method.slots if slot in _DRAW), None)
    if slot is None:
        raise ValueError(f"{method.name}: there are no pictures of the slot {', '.join(method.slots)}; of {', '.join(_DRAW)} there are")
    shape = common_shape(heads)
    try:
        found = _DRAW[slot](method, shape, length, path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror or error}") from None
    sizes = {key: value for key, value in asdict(shape).items() if key in ("hidden", "heads", "head_dim", "rotary_dim", "theta", "window")}
    return {"method": method.to_dict(), "slot": slot, "picture": str(path), "shape": sizes, **found}


def common_shape(heads: int = 32) -> Shape:
    """What methods are drawn for: Llama 2's heads, theta and window; a hidden size that a picture can show."""
    trained = Frequencies(tuple(THETA ** (-2 * j / HEAD_DIM) for j in range(HEAD_DIM // 2)))
    return Shape("llama", HIDDEN, 32, heads, heads, HEAD_DIM, HEAD_DIM, THETA, trained, "default", WINDOW)


def receptive_field(bias: np.ndarray, mass: float = MASS) -> int:
    """The smallest D for which distances 0..D hold `mass` of the sum of exp(bias) over the distances given."""
    total = np.cumsum(np.exp(bias.astype(np.float64) - bias.max()))
    return int(np.searchsorted(total, mass * total[-1]))


def receptive_fields(bias: "Callable[..., Tensor]", heads: int, length: int) -> tuple[list[np.ndarray], list[int | None]]:
    """For each head, b_h(d) of d < `length` at the last query, and its receptive field.

    None where the mass is not within the range: over twice the range the field would be more than 1 % farther.
    """
    curves, reach = [], []
    for head in range(heads):
        near, far = _at_last_query(bias, head, length), _at_last_query(bias, head, 2 * length)
        found, farther = receptive_field(near), receptive_field(far)
        curves.append(near)
        reach.append(found if farther <= 1.01 * found else None)
    return curves, reach


def _at_last_query(bias: "Callable[..., Tensor]", head: int, length: int) -> np.ndarray:
    import torch

    with torch.no_grad():
        return bias(torch.tensor([head]), torch.tensor([length - 1]), torch.arange(length - 1, -1, -1)).expand(length).numpy()


def _draw_bias(method: Method, shape: Shape, length: int, path: Path) -> dict[str, Any]:
    module = method.bias(shape)
    curves, reach = receptive_fields(module, shape.heads, length)
    figure, (left, right) = _panels(2)
    shown = _spread(0, length - 1)
    kernels = [np.exp(curve - curve.max()) for curve in curves]
    dots = [kernel[field] for kernel, field in zip(kernels, reach) if field is not None]
    lowest = max(min(kernel[shown].min() for kernel in kernels), min([2e-4, *dots])) / 2
    for head, (curve, kernel, field) in enumerate(zip(curves, kernels, reach)):
        colour = _colour(head, shape.heads)
        left.plot(shown, curve[shown], color=colour, linewidth=1)
        right.plot(shown, np.maximum(kernel[shown], lowest / 10), color=colour, linewidth=1)
        if field is not None:
            right.plot(field, kernel[field], "o", color=colour, markeredgecolor="black", markersize=5, zorder=3)
    if max(np.abs(curve).max() for curve in curves) > 50:
        left.set_yscale("symlog", linthresh=1)
    right.set(yscale="log" if lowest < 0.02 else "linear", ylim=(lowest, 1.5) if lowest < 0.02 else (0, 1.1))
    same = all(np.array_equal(curve, curves[0]) for curve in curves)
    left.set_title("bias" + ", every head the same" * same, fontsize=9)
    inside = f"{len(dots)} of {len(reach)} heads within {format_size(length)}"
    right.set_title(f"kernel; dot: receptive field, {100 * MASS:.0f} % of the mass ({inside})", fontsize=9)
    left.set_ylabel("b(d), added to logits")
    right.set_ylabel("exp b(d), largest value 1")
    for axis in (left, right):
        _tokens(axis, 0, length - 1, "distance d (tokens)")
    _head_bar(figure, right, shape.heads)
    learned = ", before training" * bool(list(module.parameters()))
    query = "" if getattr(module, "by_distance", True) else f", at query {length - 1:,}"
    _save(figure, path, _title(method) + learned + query)
    return {"length": length, "converges": method.converges(shape), "receptive_field": reach}


def _draw_attention(method: Method, shape: Shape, length: int, path: Path) -> dict[str, Any]:
    import torch

    keys = _spread(1, length)
    seen = torch.from_numpy(keys)[None]
    q = torch.ones(1, shape.heads, len(keys), shape.head_dim)
    k = torch.randn(1, 1, length, shape.head_dim, generator=torch.Generator().manual_seed(0))  # one head of keys, shared
    module = method.attention(shape)
    with torch.no_grad():
        new_q, new_k = module(q, k, seen - 1, seen, None)
        factor = (_along(new_q, q) * _along(new_k, k)[:, :, seen[0] - 1])[0].double().numpy()
    figure, (axis,) = _panels(1)
    same = bool(np.allclose(factor, factor[:1], rtol=1e-6))
    for head in range(1 if same else shape.heads):
        axis.plot(keys, factor[head], color=_colour(head, shape.heads), linewidth=1.5)
    if factor.min() > 0 and factor.max() > 30 * factor.min():
        axis.set_yscale("log")
    axis.axhline(1, color="#888888", linewidth=0.8, zorder=0)
    _mark(axis, shape.window, f"trained window, {format_size(shape.window)}")
    axis.set_title("every head the same" if same else "by head", fontsize=9)
    axis.set_ylabel("factor on logits (1: as trained)")
    _tokens(axis, 1, length, "visible keys (tokens)")
    axis.legend(fontsize=8)
    if not same:
        _head_bar(figure, axis, shape.heads)
    learned = ", before training" * bool(list(module.parameters()))
    _save(figure, path, f"{_title(method)}{learned}; keys: random normal")
    marks = _powers(length)[1:]
    at = {str(n): [float(f) for f in factor[:, int(np.searchsorted(keys, n))]] for n in marks}
    return {"length": length, "factor": {n: row[:1] if same else row for n, row in at.items()}}


def _along(new: "Tensor", old: "Tensor") -> "Tensor":
    """How much longer a vector has become in its own direction."""
    return (new * old).sum(-1) / (old * old).sum(-1)


def _draw_embedding(method: Method, shape: Shape, length: int, path: Path) -> dict[str, Any]:
    import torch

    length = min(length, getattr(method, "length", None) or shape.window)
    module = method.embedding(shape)
    with torch.no_grad():
        module.gain.fill_(1)  # type: ignore[operator, union-attr]
        vectors = module(torch.zeros(1, length, shape.hidden), torch.arange(length)[None])[0].double().numpy()
    figure, (left, right) = _panels(2)
    step = -(-length // 512)
    rows = vectors[::step]
    most = float(np.quantile(np.abs(rows), 0.995)) or 1.0  # polynomials are steep at the ends
    image = left.imshow(rows, aspect="auto", cmap="RdBu", vmin=-most, vmax=most, extent=(-0.5, shape.hidden - 0.5, length - 0.5, -0.5), interpolation="nearest")
    figure.colorbar(image, ax=left, label="value", extend="both")
    left.set_title(f"vectors at gain 1, hidden size {shape.hidden}; one position in {step}", fontsize=9)
    left.set_xlabel("dimension")
    left.set_ylabel("position (tokens)")
    left.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    distances = _spread(0, length - 1, 400)
    low, mean, high = _similarity(vectors, distances)
    right.fill_between(distances, low, high, color="#3b6fb6", alpha=0.2, linewidth=0, label="middle 80 % of them")
    right.plot(distances, mean, color="#3b6fb6", label="mean over positions")
    right.axhline(0, color="#888888", linewidth=0.8)
    right.legend(fontsize=8)
    right.set_title("similarity of two positions", fontsize=9)
    right.set_ylabel("dot product / hidden size")
    _tokens(right, 0, length - 1, "distance (tokens)")
    _save(figure, path, _title(method))
    return {"length": length, "similarity": {str(d): float(mean[np.searchsorted(distances, d)]) for d in _powers(length - 1)}}


def _similarity(vectors: np.ndarray, distances: np.ndarray) -> np.ndarray:
    """[3, distances]: 10th percentile, mean and 90th percentile of the dot product over up to 256 pairs of positions."""
    found = []
    for d in distances:
        first = np.unique((np.linspace(0, 1, 256, endpoint=False) + 1 / 512) * (len(vectors) - d)).astype(int)
        products = (vectors[first] * vectors[first + d]).mean(-1)
        found.append((np.quantile(products, 0.1), products.mean(), np.quantile(products, 0.9)))
    return np.array(found).T


def _draw_rope(method: Method, shape: Shape, length: int, path: Path) -> dict[str, Any]:
    from matplotlib.ticker import LogLocator

    change = method.rope(shape)
    trained = np.array(shape.trained.inv_freq)
    figure, (left, right) = _panels(2)
    distances = _spread(1, length, 2000)
    right.plot(distances, _rope_kernel(trained, distances), color="#999999", linewidth=0.8, label="trained")
    ratios = {}
    for colour, (size, found) in zip(("#c4572e", "#3b6fb6", "#4f9b58"), sorted(change.at.items())):
        ratios[str(size)] = (np.array(found.inv_freq) / trained).tolist()
        label = "changed" if len(change.at) == 1 else f"changed, up to {format_size(size)} tokens"
        left.plot(ratios[str(size)], color=colour, marker=".", markersize=4, linewidth=1, label=f"{label}; cos and sin × {found.attention_factor:.3g}")
        right.plot(distances, _rope_kernel(np.array(found.inv_freq), distances), color=colour, linewidth=0.8, label=label)
    left.axhline(1, color="#999999", linewidth=1)
    slow = int((2 * np.pi / trained <= shape.window).sum())
    _mark(left, slow - 0.5, f"right of it: trained wavelength above {format_size(shape.window)}")
    left.set(yscale="log", title="frequency of each rotary pair", xlabel="pair j (fast to slow)", ylabel="changed / trained frequency")
    if left.get_ylim()[0] > 1e-3:
        left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    left.yaxis.set_minor_formatter(lambda value, _: "")
    left.grid(alpha=0.25)
    right.axhline(0, color="#888888", linewidth=0.8)
    right.set_ylim(-0.5, 1.1)
    _mark(right, shape.window, f"trained window, {format_size(shape.window)}")
    right.set(title="attention kernel of RoPE", ylabel="mean over pairs of cos(frequency × d)")
    _tokens(right, 1, length, "distance d (tokens)")
    for axis in (left, right):
        axis.title.set_fontsize(9)
        axis.legend(fontsize=8, loc="best" if axis is left else "upper right")
    _save(figure, path, _title(method))
    factors = {str(size): found.attention_factor for size, found in change.at.items()}
    return {"length": length, "window": change.window, "relative_frequency": ratios, "attention_factor": factors}


def _rope_kernel(inv_freq: np.ndarray, distances: np.ndarray) -> np.ndarray:
    return np.cos(np.multiply.outer(distances, inv_freq)).mean(-1)


def _draw_positions(method: Method, shape: Shape, length: int, path: Path) -> dict[str, Any]:
    """The picture of `longctx finetune --dry-run`, for the common window."""
    from hf_longctx.data import coverage
    from hf_longctx.reporting import plot_coverage

    target = max(shape.window, length)
    if hasattr(method, "target"):
        target = method.target or target
        if target < shape.window:
            raise ValueError(f"{method.name}: target {target} is below the window of the picture, {shape.window}")
        method = replace(method, target=target)  # type: ignore[call-arg]
    found = coverage(method, shape.window, target)
    plot_coverage(found, shape.window, path, f"{method.name}, {format_size(shape.window)} -> {format_size(target)}")
    return {"length": target, **{key: found[key] for key in ("bins", "last_window", "never", "far_pairs", "draws")}}


_DRAW: dict[str, Callable[[Method, Shape, int, Path], dict[str, Any]]] = {
    "bias": _draw_bias, "attention": _draw_attention, "embedding": _draw_embedding, "rope": _draw_rope, "positions": _draw_positions,
}  # fmt: skip


def _panels(count: int) -> tuple[Any, Sequence[Any]]:
    from matplotlib.figure import Figure  # without pyplot there is nothing to close

    figure = Figure(figsize=(6.2 if count == 1 else 11, 4.2), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def _save(figure: Any, path: Path, title: str) -> None:
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=140)


def _title(method: Method) -> str:
    import textwrap

    defaults = {field.name: field.default for field in fields(method)}
    values = ", ".join(f"{key} {value}" for key, value in method.to_dict().items() if key != "name" and getattr(method, key) != defaults[key])
    return textwrap.shorten(f"{method.name} ({values})" if values else method.name, 110, placeholder=" ...")


def _spread(first: int, last: int, count: int = _SAMPLES) -> np.ndarray:
    """Whole numbers, evenly spread on a log scale, powers of two among them."""
    found = np.geomspace(max(first, 1), last, count).round().astype(np.int64)
    return np.unique(np.concatenate([[first], found, [n for n in _powers(last) if n >= first]]).astype(np.int64))


def _powers(last: int) -> list[int]:
    return [0, *(2**i for i in range(last.bit_length()))]


def _tokens(axis: Any, first: int, last: int, label: str) -> None:
    """A log axis of tokens, or with `first` 0 one that shows distance 0 too."""
    ticks = [n for n in (0, *(8**i for i in range(last.bit_length() // 3 + 1))) if first <= n < last / 2]
    ticks.append(last + 1 if first == 0 else last)
    axis.set_xscale("symlog" if first == 0 else "log", **({"linthresh": 1} if first == 0 else {}))
    axis.set_xticks(ticks, [format_size(n) for n in ticks])
    axis.minorticks_off()
    axis.set_xlim(first, ticks[-1])
    axis.set_xlabel(label)
    axis.grid(alpha=0.25)


def _mark(axis: Any, at: float, label: str) -> None:
    axis.axvline(at, color="#888888", linestyle="--", linewidth=1, label=label)


def _colour(head: int, heads: int) -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"](head / max(1, heads - 1))


def _head_bar(figure: Any, axis: Any, heads: int) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    figure.colorbar(ScalarMappable(Normalize(1, max(2, heads)), "viridis"), ax=axis, label="head")
