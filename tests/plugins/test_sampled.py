"""The codec `sampled`: in expectation, the teacher's distribution at one temperature."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from kdframe.api import DenseTargets, InputError, TeacherOutputs, TeacherShape, WeightedTargets
from kdframe_codecs import Sampled
from kdframe_codecs.drawn import keys, rounded, systematic, uniform
from kdframe_codecs.drawn_records import COMMON_GRID, OWN_GRID, Drawn, Layout
from kdframe_logit_kd import LogitKD
from tests.run_kit import filled, learn, lesson, lines, load, token_rows

SEEDS, ROWS = 5, 1000
TESTED_APART = 0.002  # a likelier id is drawn often enough for its own error to be known


def random_logits(n: int, vocab_size: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(n, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def coded(logits: torch.Tensor, **settings) -> WeightedTargets:
    codec = Sampled(**settings).build(TeacherShape(logits.shape[1]))
    return codec.decode(codec.encode(TeacherOutputs.of(logits)))


def whole(targets: WeightedTargets, vocab_size: int) -> torch.Tensor:
    """The weights at their ids, `[n, V]`."""
    weights = targets.weights.double()
    return weights.new_zeros(len(targets), vocab_size).scatter_add(-1, targets.ids, weights)


def no_id_twice(targets: WeightedTargets) -> bool:
    rows = zip(targets.ids, targets.weights, strict=True)
    drawn = [ids[weights > 0].tolist() for ids, weights in rows]
    return all(len(set(ids)) == len(ids) for ids in drawn)


def independent_draws(logits: torch.Tensor, **settings) -> WeightedTargets:
    """Many draws from one distribution `[1, V]`: by several seeds, and moved by constants.

    A constant added to all logits changes the draw but not the distribution; here it is exact.
    """
    moved = (logits * 64).round() / 64 + torch.arange(ROWS)[:, None]
    drawn = [coded(moved, seed=seed, **settings) for seed in range(SEEDS)]
    width = max(targets.ids.shape[1] for targets in drawn)
    ids, weights = (
        torch.cat([F.pad(x, (0, width - x.shape[1])) for x in xs])
        for xs in ([t.ids for t in drawn], [t.weights for t in drawn])
    )
    return WeightedTargets(ids, weights, drawn[0].temperature)


def distribution(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """What `independent_draws` draws from, `[V]`."""
    return torch.softmax((logits[0] * 64).round().double() / 64 / temperature, dim=-1)


def assert_within_four_errors(draws: torch.Tensor, expected: torch.Tensor) -> None:
    """The mean of `draws [n, ...]` is `expected`, by its own standard error."""
    mean, error = draws.mean(0), draws.std(0) / len(draws) ** 0.5
    assert ((mean - expected).abs() <= 4 * error + 1e-7).all()


def assert_the_mean_is(p: torch.Tensor, targets: WeightedTargets) -> None:
    """For each id; those that are hardly ever drawn, in sums that are drawn often enough."""
    draws = whole(targets, len(p))
    likely = p >= TESTED_APART
    if likely.any():
        assert_within_four_errors(draws[:, likely], p[likely])
    rare = (~likely).nonzero()[:, 0]
    bucket = torch.div(p[rare].cumsum(0), TESTED_APART, rounding_mode="floor").long()
    buckets = 1 + int(1 / TESTED_APART)
    expected = p.new_zeros(buckets).index_add_(0, bucket, p[rare])
    sums = draws.new_zeros(len(draws), buckets).index_add_(1, bucket, draws[:, rare])
    tested = expected >= TESTED_APART / 2
    if tested.any():
        assert_within_four_errors(sums[:, tested], expected[tested])


SHAPES = {
    "like a language model's": random_logits(1, 600, 1, 3.0),
    "nearly flat": random_logits(1, 600, 2, 0.3),
    "flat": torch.zeros(1, 600),
    "peaked": random_logits(1, 600, 3, 8.0),
    "one sure, the others equal": torch.zeros(1, 600).index_fill_(1, torch.tensor([37]), 9.0),
    "all in one group": torch.full((1, 640), -torch.inf).index_fill_(
        1, torch.arange(3, 640, 16), 0.0
    ),
    "two ids in one group": torch.zeros(1, 640).index_fill_(1, torch.tensor([5, 21]), 3.0),
    "few ids": random_logits(1, 7, 4, 1.0),
    "large logits": random_logits(1, 600, 5, 3.0) + 70_000,
    "half impossible": random_logits(1, 600, 6, 3.0).masked_fill(
        torch.arange(600) % 2 == 0, -torch.inf
    ),
}


# -------------------------------------------------------------------------------- no bias
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_mean_of_many_draws_is_the_distribution(shape, temperature):
    logits = SHAPES[shape]
    p = distribution(logits, temperature)
    targets = independent_draws(logits, entries=8, temperature=temperature)
    assert_the_mean_is(p, targets)
    assert torch.isfinite(targets.weights).all()
    assert (targets.weights >= 0).all()
    assert no_id_twice(targets)
    assert not whole(targets, len(p))[:, p == 0].any()
    assert_within_four_errors(targets.weights.sum(-1).double(), torch.tensor(1.0).double())


@pytest.mark.parametrize("entries", [1, 2, 3, 30])
def test_the_smallest_record_has_no_bias_either(entries):
    logits = random_logits(1, 200, 9, 2.0)
    assert_the_mean_is(distribution(logits), independent_draws(logits, entries=entries))


def test_the_mean_over_seeds_alone_is_the_distribution():
    """The numbers of a position come from its own logits: here nothing but the seed changes."""
    logits = random_logits(1, 100, 8, 1.5)
    draws = torch.cat([whole(coded(logits, entries=3, seed=seed), 100) for seed in range(400)])
    p = torch.softmax(logits[0].double(), dim=-1)
    assert_within_four_errors(draws[:, p > 0.02], p[p > 0.02])


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_expected_gradient_is_that_of_the_whole_distribution(temperature):
    teacher, student = random_logits(1, 300, 1), random_logits(1, 300, 2)
    targets = independent_draws(teacher, entries=6, temperature=temperature)
    loss = LogitKD(alpha=0.2, temperature=temperature).build()

    def gradients(targets):
        logits = student.expand(len(targets), -1).clone().requires_grad_()
        total = loss(logits, targets, torch.full((len(targets),), 5)).total.sum()
        return torch.autograd.grad(total, logits)[0].double()

    full = gradients(DenseTargets(distribution(teacher).float().log()[None]))[0]
    error = (gradients(targets) - full) / temperature / 0.8  # that of p, by the formula
    assert_within_four_errors(
        error[:, distribution(teacher, temperature) > TESTED_APART], torch.zeros(1)
    )


def test_rounding_by_chance_keeps_the_expectation():
    grid = np.array([0.0, 0.1, 0.4, 1.0])
    chance = (np.arange(10_000) + 0.5) / 10_000
    for value in (0.0, 0.03, 0.1, 0.25, 0.99, 1.0):
        places = rounded(np.full(10_000, value), grid, chance)
        assert grid[places].mean() == pytest.approx(value, abs=1e-4)


def test_systematic_draws_are_in_proportion_and_never_of_nothing():
    values = torch.tensor([[0.0, 1.0, 0.0, 2.0, 3.0, 0.0]]).double()
    starts = (torch.arange(600).double() + 0.5) / 600
    places = systematic(values.expand(600, -1), torch.full((600,), 2), starts)
    drawn = torch.bincount(places.flatten(), minlength=6) / 600
    torch.testing.assert_close(drawn.double(), 2 * values[0] / 6, atol=2e-3, rtol=0)
    assert (places[:, 0] < places[:, 1]).all()


# --------------------------------------------------------------------- what is kept for certain
def test_where_there_is_room_for_every_id_every_id_is_there():
    logits = random_logits(5, 12, scale=1.0)
    p = torch.softmax(logits.double(), dim=-1)
    found = whole(coded(logits, entries=80), 12)
    assert ((found - p).abs() <= 2 * p.sqrt() / 127 + 1 / 127**2).all()  # the grid's step


def test_a_sure_teacher_is_given_back_exactly():
    logits = torch.full((1, 500), -torch.inf)
    logits[0, 123] = 4.0
    targets = coded(logits, entries=4)
    assert targets.ids[targets.weights > 0].tolist() == [123]
    assert targets.weights.sum() == 1


def test_more_entries_vary_less():
    logits = random_logits(300, 3000)
    p = torch.softmax(logits.double(), dim=-1)
    errors = [
        (whole(coded(logits, entries=entries), 3000) - p).square().sum() for entries in (8, 16, 32)
    ]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_it_varies_less_than_half_of_what_draws_with_replacement_do_at_equal_bytes():
    logits = random_logits(400, 49_152, scale=3.2)
    p = torch.softmax(logits.double(), dim=-1)
    size = Sampled().record_bytes(TeacherShape(49_152))
    assert size <= 60
    n = 1
    while 3 * (1 - (1 - p[:50]) ** n).sum(-1).mean() < size:  # 24 bits for each distinct id
        n += 1
    random = (1 - p.square().sum(-1)).sum() / n
    assert (whole(coded(logits), 49_152) - p).square().sum() < 0.5 * random


# ------------------------------------------------------------------------------- reproducible
def test_equal_logits_give_equal_records_in_any_batch():
    logits = random_logits(90, 5000)
    codec = Sampled(entries=12, seed=3).build(TeacherShape(5000))
    records = codec.encode(TeacherOutputs.of(logits))
    order = torch.randperm(90, generator=torch.Generator().manual_seed(1))
    shuffled = codec.encode(TeacherOutputs.of(logits[order]))
    assert np.array_equal(shuffled, records[order.numpy()])
    alone = [codec.encode(TeacherOutputs.of(row[None])) for row in logits]
    assert np.array_equal(np.concatenate(alone), records)


def test_the_rounding_of_a_forward_pass_changes_hardly_any_draw():
    """A second reading in another batch can be compared with what is stored."""
    logits = random_logits(500, 5000)
    one, other = (
        whole(coded(x), 5000) for x in (logits, logits + 1e-5 * random_logits(500, 5000, 1))
    )
    assert ((one - other).abs().sum(-1) / 2).mean() < 0.01


def test_another_seed_draws_other_ids():
    logits = random_logits(20, 5000, scale=1.0)
    draws = [whole(coded(logits, seed=seed), 5000) > 0 for seed in (0, 1, -1, 2**40)]
    for i, one in enumerate(draws):
        for other in draws[:i]:
            assert (one != other).any(-1).all()


def test_random_numbers_are_uniform_over_rows_seeds_and_uses():
    rows = np.random.default_rng(0).integers(-50, 1000, size=(4000, 8))
    one = rows[:1]
    drawn = {
        "rows": uniform(keys(0, rows), 1),
        "seeds": np.concatenate([uniform(keys(seed, one), 1) for seed in range(4000)]),
        "uses": uniform(keys(0, one), np.arange(4000)),
    }
    for name, found in drawn.items():
        counts = np.histogram(found, bins=20, range=(0, 1))[0]
        assert ((counts - 200) ** 2 / 200).sum() < 45, name  # chi-square, p = 0.0007
        assert abs(np.corrcoef(found[1:], found[:-1])[0, 1]) < 0.06, name


# ---------------------------------------------------------------------------------- records
@pytest.mark.parametrize("entries", [1, 5, 28, 400])
@pytest.mark.parametrize("vocab_size", [1, 2, 300, 49_152, 65_537, 151_936, 262_144])
def test_records_give_back_what_they_were_given(vocab_size, entries):
    layout = Layout(vocab_size, entries)
    chance = np.random.default_rng(entries)
    n, prices = 7, layout.prices
    a = chance.integers(0, min(vocab_size, prices.room // prices.certain) + 1, n)
    t = np.minimum((prices.room - a * prices.certain) // prices.unlikely, layout.members)
    likely, unlikely = np.zeros((n, a.max()), np.int64), np.zeros((n, t.max()), np.int64)
    for i in range(n):
        likely[i, : a[i]] = np.sort(chance.choice(vocab_size, a[i], replace=False))
        unlikely[i, : t[i]] = np.sort(chance.choice(layout.members, t[i], replace=False))
    for i in range(min(n, 3)):  # the ends of the ranges
        likely[i, : a[i]][-1:], unlikely[i, : t[i]][-1:] = vocab_size - 1, layout.members - 1
    given = Drawn(
        group=chance.integers(0, layout.groups, n),
        counts=np.stack([a, t], axis=1),
        weights=chance.integers(0, 256, (n, 2)),
        likely=likely,
        certain=chance.random(likely.shape) < 0.5,
        own=chance.integers(0, 128, likely.shape),
        unlikely=unlikely,
    )
    records = layout.pack(given)
    assert records.dtype == np.uint8
    assert records.shape == (n, layout.record_bytes)
    ids, weights = layout.unpack(records)
    common = COMMON_GRID.astype(np.float32)[given.weights]
    for i in range(n):
        wanted = [*likely[i, : a[i]], *(unlikely[i, : t[i]] * layout.groups + given.group[i])]
        assert ids[i, : a[i] + t[i]].tolist() == wanted
        own = OWN_GRID.astype(np.float32)[given.own[i, : a[i]]]
        first = np.where(given.certain[i, : a[i]], own, common[i, 0])
        assert weights[i, : a[i]].tolist() == first.tolist()
        assert (weights[i, a[i] : a[i] + t[i]] == common[i, 1]).all()
        assert not weights[i, a[i] + t[i] :].any()


@pytest.mark.parametrize("vocab_size", [151_936, 262_144])
def test_ids_of_large_vocabularies_survive(vocab_size):
    logits = torch.full((3, vocab_size), -20.0)
    liked = [0, 65_536, vocab_size - 1]
    logits[torch.arange(3), liked] = 20.0
    targets = coded(logits)
    assert targets.ids[torch.arange(3), targets.weights.argmax(-1)].tolist() == liked


def test_sizes_are_what_the_settings_say():
    for vocab_size in (1, 50, 49_152, 262_144):
        for entries in (1, 28, 500):
            config, shape = Sampled(entries=entries), TeacherShape(vocab_size)
            records = config.build(shape).encode(TeacherOutputs.of(torch.zeros(2, vocab_size)))
            assert records.shape == (2, config.record_bytes(shape))


def test_no_positions_are_no_trouble():
    codec = Sampled().build(TeacherShape(1000))
    records = codec.encode(TeacherOutputs.of(torch.empty(0, 1000)))
    assert records.shape == (0, codec.record_bytes)
    assert len(codec.decode(records)) == 0


def test_half_precision_logits_and_read_only_records_are_taken():
    codec = Sampled().build(TeacherShape(1000))
    records = codec.encode(TeacherOutputs.of(random_logits(4, 1000).bfloat16()))
    expected = codec.decode(records)
    records.flags.writeable = False
    assert torch.equal(codec.decode(records).weights, expected.weights)
    strided = np.repeat(records, 2, axis=0)[::2]
    assert torch.equal(codec.decode(strided).ids, expected.ids)


# --------------------------------------------------------------------------------- in a run
def test_it_serves_the_temperature_of_its_draws_alone():
    assert Sampled(temperature=2).serves(2.0)
    assert not Sampled(temperature=2).serves(1.0)
    with pytest.raises(InputError, match="set the codec's `temperature`"):
        coded(random_logits(2, 100), temperature=2.0).at(1.0)


def test_a_student_learns_from_draws(tmp_path, teacher_folder, student_folder):
    rows = token_rows(12, longest=30)
    cache = filled(tmp_path / "cache", load(teacher_folder), [rows], Sampled(entries=24))
    student = load(student_folder)
    settings = {"learning_rate": 3e-3, "batch_size": 4, "epochs": 6, "eval_steps": 3}
    loss = LogitKD(alpha=0).build()
    learn(lesson(tmp_path / "run", student, cache, rows, loss=loss, **settings))
    soft = [line["soft"] for line in lines(tmp_path / "run") if "soft" in line]
    assert np.isfinite(soft).all()
    assert np.mean(soft[-2:]) < np.mean(soft[:2]) - 0.1
