"""Dynamic NTK (emozilla, 2023): the base grows with the length seen, so short inputs keep their trained frequencies."""

from dataclasses import dataclass

from hf_longctx.method import Frequencies, Method, RopeChange, Shape, require, require_factor


@dataclass(frozen=True)
class DynamicNtk(Method):
    """NTK whose base grows with the length seen, for inference only.

    base' = base (factor l / L - (factor - 1))^(D/(D-2)) for a length l beyond the trained window L.

    Inference only: keys already cached keep the base they were rotated with, and skipped training positions would
    move the base from batch to batch. `max_position_embeddings` stays at L, since Transformers takes l from there."""

    paper = "https://www.reddit.com/r/LocalLLaMA/comments/14mrgpr"
    static = False
    factor: float

    def __post_init__(self) -> None:
        require_factor(self.factor)

    def rope(self, shape: Shape) -> RopeChange:
        require(shape.plain, f"dynamic_ntk needs a model trained with plain RoPE; this one was trained with {shape.rope_type}")
        require(shape.rotary_dim > 2, "dynamic_ntk stretches the pairs against each other; this model rotates only one")
        longest = round(shape.window * self.factor)
        native = {"rope_type": "dynamic", "factor": float(self.factor)}
        lengths = {shape.window, longest}
        return RopeChange({n: self._at(n, shape) for n in lengths}, longest, native, raise_limit=False)

    def _at(self, length: int, shape: Shape) -> Frequencies:
        dim = shape.rotary_dim
        growth = self.factor * length / shape.window - (self.factor - 1)
        return Frequencies(tuple(f * growth ** (-2 * j / (dim - 2)) for j, f in enumerate(shape.trained.inv_freq)))
