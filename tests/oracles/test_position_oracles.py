"""Samplers of training positions against independent ones, written with `random` from the papers' and scripts' text.

Random numbers cannot be compared one by one, so distributions are: means of positions and of the share of examples that
train each distance, within five standard errors, on fixed seeds.
"""

import math
import random

import numpy as np
import pytest

from hf_longctx.method import method, method_names


def pose_paper(window, document, target, chunks, content, pin, rng):
    """PoSE v2, section 3.2: N chunks, u_i ~ U{u_{i-1}..Lt-Lc}, v_i ~ U{v_{i-1}..Lx-Lc}; cut points uniform without repetition."""
    cuts = [0, *sorted(rng.sample(range(1, window), chunks - 1)), window]
    tokens, positions, u, v = [], [], 0, 0
    pinned = rng.random() < pin
    for i in range(chunks):
        if i:
            u = rng.randint(u, target - window)
            v = rng.randint(v, document - window)
        if pinned and i == chunks - 1:
            u = target - window
        shift = {"none": 0, "random": v, "aligned": min(u, document - window)}[content]
        tokens += [j + shift for j in range(cuts[i], cuts[i + 1])]
        positions += [j + u for j in range(cuts[i], cuts[i + 1])]
    return tokens, positions


def pose_code(window, document, target, rng):
    """train_preprocess_function_pose of dwzhu-pku/PoSE: text of at most five windows, the first chunk at most half of one."""
    text = min(document, 5 * window)
    first = rng.randint(1, (window + 1) // 2)
    end = rng.randint(window, text)
    skip = rng.randint(0, target - window)
    tokens = [*range(first), *range(end - (window - first), end)]
    return tokens, [j if j < first else j + skip for j in range(window)]


def cream(window, document, target, sigma, rng):
    """train.py of bigai-nlco/CREAM, with the library's stated departures: a coin per example, a truncated normal (here by
    rejection) that is not rounded down, head and tail at most a third of the window."""
    factor = target / window
    sigma = sigma or 0.375 * factor
    edge = window // 3 if rng.random() < 0.5 else min(math.ceil(4 * factor), window // 3)
    middle = window - 2 * edge
    alpha = rng.gauss(1 + factor, sigma)
    while not 2 <= alpha <= 2 * factor:
        alpha = rng.gauss(1 + factor, sigma)
    low, high = int(edge + (middle - 1) * alpha / 2), int(alpha / 2 * window) - edge - 1
    end = min(max(rng.randint(low, max(low, high)), edge + middle - 1), target - edge - 1)
    positions = [*range(edge), *range(end - middle + 1, end + 1), *range(target - edge, target)]
    return None, positions


def randpos(window, document, target, rng):
    """The baseline in PoSE's script: sorted(random.sample(range(Lt), Lc))."""
    return list(range(window)), sorted(rng.sample(range(target), window))


def statistics(draw, target, bins=16):
    """Per draw: every position, every token index, and which sixteenth of all distances it trains how much of."""
    tokens, positions = draw
    distances = np.zeros(target, bool)
    positions = np.asarray(positions)
    distances[np.subtract.outer(positions, positions)[np.tril_indices(len(positions), -1)]] = True
    covered = [part.mean() for part in np.array_split(distances, bins)]
    return np.concatenate([positions, [] if tokens is None else tokens, covered])


def assert_alike(ours, theirs):
    """Welch's z of every statistic below 5 (some 10^2 are looked at; the chance of a false alarm is 10^-4)."""
    a, b = np.array(ours, float), np.array(theirs, float)
    error = np.sqrt(a.var(0) / len(a) + b.var(0) / len(b))
    difference = np.abs(a.mean(0) - b.mean(0))
    assert (difference[error == 0] == 0).all()
    z = difference[error > 0] / error[error > 0]
    assert z.max() < 5, f"z = {z.max():.1f} at {z.argmax()}"


WINDOW, DOCUMENT, TARGET, DRAWS = 36, 150, 72, 1500  # 4 f < a third of the window, so that CREAM's coin matters
SAMPLERS = {
    "pose, two chunks": ("pose", {}, lambda r: pose_paper(WINDOW, DOCUMENT, TARGET, 2, "random", 0, r)),
    "pose, four chunks": ("pose", {"chunks": 4, "content": "none"}, lambda r: pose_paper(WINDOW, DOCUMENT, TARGET, 4, "none", 0, r)),
    "pose, aligned": ("pose", {"chunks": 3, "content": "aligned"}, lambda r: pose_paper(WINDOW, DOCUMENT, TARGET, 3, "aligned", 0, r)),
    "pose, pinned": ("pose", {"pin_tail": 0.5}, lambda r: pose_paper(WINDOW, DOCUMENT, TARGET, 2, "random", 0.5, r)),
    "pose, partly plain": ("pose", {"plain": 0.25, "content": "aligned"}, lambda r: pose_paper(WINDOW, DOCUMENT, WINDOW if r.random() < 0.25 else TARGET, 2, "aligned", 0, r)),
    "pose, code": ("pose", {"form": "code"}, lambda r: pose_code(WINDOW, DOCUMENT, TARGET, r)),
    "pose, code, long text": ("pose", {"form": "code"}, lambda r: pose_code(WINDOW, 10 * DOCUMENT, TARGET, r)),
    "cream": ("cream", {}, lambda r: cream(WINDOW, DOCUMENT, TARGET, None, r)),
    "cream, sigma": ("cream", {"sigma": 0.2}, lambda r: cream(WINDOW, DOCUMENT, TARGET, 0.2, r)),
    "random_positions": ("random_positions", {}, lambda r: randpos(WINDOW, DOCUMENT, TARGET, r)),
}


def draws(name, fields, number, window=WINDOW, document=DOCUMENT, target=TARGET):
    sampler = method(name, **({} if name == "plain" else {"target": target}), **fields)
    return [sampler.positions(window, document, np.random.default_rng((7, i))) for i in range(number)]


@pytest.mark.parametrize("case", SAMPLERS)
def test_sampler_is_distributed_as_its_oracle(case):
    name, fields, independent = SAMPLERS[case]
    document = 10 * DOCUMENT if case.endswith("long text") else DOCUMENT
    rng = random.Random(11)
    theirs = [independent(rng) for _ in range(DRAWS)]
    ours = draws(name, fields, DRAWS, document=document)
    if theirs[0][0] is None:
        ours = [(None, positions) for _, positions in ours]
    assert_alike([statistics(d, TARGET) for d in ours], [statistics(d, TARGET) for d in theirs])


def test_the_comparison_tells_samplers_apart():
    """The oracle can fail: the code form, or a pinned tail, are no two-chunk paper form."""
    paper = [statistics(d, TARGET) for d in draws("pose", {}, DRAWS)]
    for fields in ({"form": "code"}, {"pin_tail": 0.1}, {"content": "none"}, {"plain": 0.1}):
        with pytest.raises(AssertionError):
            assert_alike(paper, [statistics(d, TARGET) for d in draws("pose", fields, DRAWS)])


def test_every_position_method_has_an_oracle():
    assert {name for name, _, _ in SAMPLERS.values()} | {"plain"} == set(method_names("positions"))


EVERY = [
    ("plain", {}),
    ("random_positions", {}),
    ("cream", {}),
    ("cream", {"sigma": 0.1}),
    ("cream", {"sigma": 1e9}),
    *(("pose", {"content": content, "chunks": chunks}) for content in ("none", "random", "aligned") for chunks in (2, 5, 64)),
    ("pose", {"form": "code"}),
    ("pose", {"pin_tail": 1.0}),
    ("pose", {"plain": 0.5}),
    ("pose", {"form": "code", "pin_tail": 1.0, "content": "aligned"}),
]
SIZES = [(24, 100, 96), (24, 24, 96), (24, 24, 24), (24, 1000, 24), (8, 20, 512), (16, 16, 31), (3, 3, 3), (2, 9, 7), (1, 1, 8), (17, 40, 18)]


@pytest.mark.parametrize(("name", "fields"), EVERY)
@pytest.mark.parametrize(("window", "document", "target"), SIZES)
def test_bounds(name, fields, window, document, target):
    """Whatever the sizes - a window that is the target or the document, fewer tokens than chunks: strictly increasing, in bounds."""
    for tokens, positions in draws(name, fields, 40, window, document, target):
        assert tokens.shape == positions.shape == (window,)
        assert (np.diff(tokens) > 0).all()
        assert (np.diff(positions) > 0).all()
        assert tokens[0] >= 0
        assert tokens[-1] < document
        assert positions[0] >= 0
        assert positions[-1] < target
        if name != "random_positions" and window > 2:
            assert positions[0] == 0


@pytest.mark.parametrize(("name", "fields"), EVERY)
def test_the_generator_is_the_only_source_of_randomness(name, fields):
    first, second = (draws(name, fields, 5) for _ in range(2))
    assert all((a == b).all() for x, y in zip(first, second) for a, b in zip(x, y))


@pytest.mark.parametrize("chunks", [2, 3, 8])
def test_pose_has_no_more_gaps_than_chunks(chunks):
    """And with room to skip, mostly exactly one between each two."""
    gaps = [int((np.diff(p) > 1).sum()) for _, p in draws("pose", {"chunks": chunks}, 200, target=10_000)]
    assert max(gaps) == chunks - 1
    assert np.mean(np.array(gaps) == chunks - 1) > 0.7


def test_pose_chunks_are_as_many_as_asked_in_a_window_that_small():
    """64 chunks of a window of 8 are 8 chunks of one token."""
    assert max(int((np.diff(p) > 1).sum()) for _, p in draws("pose", {"chunks": 64}, 100, 8, 8, 10_000)) == 7


@pytest.mark.parametrize("form", ["paper", "code"])
def test_a_pinned_tail_always_reaches_the_target(form):
    assert all(p[-1] == TARGET - 1 for _, p in draws("pose", {"pin_tail": 1.0, "form": form}, 200))


def test_pose_code_form_starts_with_at_most_half_a_window():
    """And sometimes with exactly that, sometimes with one token."""
    first = [int(np.argmax(np.diff(p) > 1)) + 1 for _, p in draws("pose", {"form": "code"}, 2000, target=10_000) if (np.diff(p) > 1).any()]
    assert (min(first), max(first)) == (1, (WINDOW + 1) // 2)


def test_pose_code_form_reads_five_windows_at_most():
    assert max(t[-1] for t, _ in draws("pose", {"form": "code"}, 500, document=10_000)) in range(5 * WINDOW - 6, 5 * WINDOW)


def test_pose_content():
    """none: consecutive text; aligned: the text that stands there; random: neither."""
    consecutive = np.arange(WINDOW)
    assert all((t == consecutive).all() for t, _ in draws("pose", {"content": "none"}, 50))
    assert all((t == p).all() for t, p in draws("pose", {"content": "aligned"}, 50, document=TARGET))
    drawn = draws("pose", {"content": "random"}, 50)
    assert sum((t == consecutive).all() or (t == p).all() for t, p in drawn) < 5


@pytest.mark.parametrize("factor", [1, 1.5, 4, 64])
def test_cream_pins_head_and_tail(factor):
    """Head at 0, tail at target - 1, each 4 f tokens or a third of the window, the middle between them."""
    window = 48
    target = int(window * factor)
    lengths = set()
    for tokens, positions in draws("cream", {}, 300, window, 2 * target, target):
        breaks = np.flatnonzero(np.diff(positions) > 1) + 1
        assert len(breaks) <= 2
        assert (positions[0], positions[-1]) == (0, target - 1)
        assert (tokens == positions).all()  # the document reaches the target: every token stands where it is said to
        if len(breaks) == 2:
            lengths |= {int(breaks[0]), window - int(breaks[1])}
    assert factor == 1 or lengths == {window // 3, min(math.ceil(4 * factor), window // 3)}


@pytest.mark.parametrize("document", [48, 50, 200])
def test_cream_text_of_a_short_document(document):
    """Head and tail are the document's own first and last tokens, the middle is text between them."""
    for tokens, _ in draws("cream", {}, 100, 48, document, 4 * 48):
        assert tokens[0] == 0
        assert tokens[-1] == min(document, 4 * 48) - 1


def uncovered(sigma):
    """The share of distances that 400 examples never train at f = 64, by differences of segments."""
    window, target = 2048, 131072
    seen = np.zeros(target, bool)
    for _, positions in draws("cream", {"sigma": sigma}, 400, window, window, target):
        segments = np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1)
        for i, late in enumerate(segments):
            for early in segments[: i + 1]:
                seen[max(0, late[0] - early[-1]) : late[-1] - early[0] + 1] = True
    return 1 - seen.mean()


def test_cream_sigma_grows_with_the_factor():
    """At f = 64 the script's fixed sigma of 3 leaves three tenths of all distances untrained; 0.375 f leaves one in sixteen."""
    assert uncovered(None) < 0.08
    assert uncovered(3.0) > 0.25


@pytest.mark.parametrize("options", [{"name": "plain"}, {"name": "pose"}, {"name": "pose", "chunks": 5, "plain": 0.3}, {"name": "cream"}, {"name": "random_positions"}], ids=str)
def test_no_example_has_more_runs_than_are_declared(options):
    item = method(**options | ({} if options["name"] == "plain" else {"target": 4096}))
    drawn = [item.positions(64, 5000, np.random.default_rng(seed))[1] for seed in range(200)]
    runs = [1 + int((np.diff(positions) > 1).sum()) for positions in drawn]
    assert 0.9 * item.runs(64) <= max(runs) <= item.runs(64)
    assert item.runs(64) > 1 or not any(positions[0] for positions in drawn)
