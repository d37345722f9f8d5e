"""A teacher that is asked answers as a cache of it does."""

import pytest
import torch
from transformers import LlamaConfig

from kdframe.live_teacher import LiveTeacher
from kdframe.output_layer import Halves
from kdframe.targets import met
from kdframe_codecs import Dense, TopK
from tests.run_kit import filled, load, token_rows
from tests.test_caching import own_words
from tests.test_output_layer import Bent, build

V = 400


@pytest.fixture(scope="module")
def rows():
    return token_rows(6)


@pytest.fixture(scope="module")
def teacher(teacher_folder):
    return load(teacher_folder)


def asked(live, rows, width=V):
    every = range(len(rows))
    return live.targets([rows.row(i) for i in every], [rows.request(i) for i in every], width)


@pytest.mark.parametrize("codec", [TopK(k=16), Dense(precision="float32")])
@pytest.mark.parametrize("width", [350, 400, 450])
def test_with_a_codec_it_says_what_the_cache_says(tmp_path, teacher, rows, codec, width):
    store = filled(tmp_path, teacher, [rows], codec)
    live = asked(LiveTeacher(Halves(teacher), store.codec), rows, width)
    kept = store.targets([rows.request(i) for i in range(len(rows))], width)
    assert type(live) is type(kept)
    for name, value in vars(kept).items():
        if torch.is_tensor(value):
            torch.testing.assert_close(getattr(live, name), value, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("model", ["halves", "whole"])
def test_without_one_it_says_exactly_what_it_thinks(teacher, rows, model):
    model = teacher if model == "halves" else build(Bent, LlamaConfig, vocab_size=V).eval()
    found = met(asked(LiveTeacher(Halves(model)), rows))
    right = torch.cat([own_words(model, rows, i) for i in range(len(rows))])
    torch.testing.assert_close(found.log_probs, right, rtol=1e-4, atol=1e-4)
