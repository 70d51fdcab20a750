"""Names of files, columns and classes never become markup in a model card or a page."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from diffusion.config import Config
from diffusion.data.dataset import DataSpec
from diffusion.networks.build import build_network
from diffusion.training.checkpoints import TrainedModel
from workflows.publishing.markdown import code, code_block, plain
from workflows.publishing.model_card import model_card

PARSER = MarkdownIt("gfm-like", {"linkify": False})
HOSTILE = [
    "<script>alert(1)</script>",
    "`<img src=x onerror=alert(1)>`",
    "a | b\n\n# heading\n\n[link](http://evil)",
    "``` \n<b>out</b>\n```",
    "![x](http://evil/x.png)",
    "x\x1b[31m\u202e",
    "\\`<i>",
    "|",
    "`",
    "",
]
MARKUP = st.text(st.sampled_from("`|<>[]()!*_#\\\n~&; abhttp:/w.@") | st.characters(), max_size=30)


def tokens(markdown):
    for token in PARSER.parse(markdown):
        yield token
        yield from token.children or []


def texts(markdown, kinds=("text", "code_inline", "text_special")):
    return "".join(token.content for token in tokens(markdown) if token.type in kinds)


@pytest.mark.parametrize("text", HOSTILE, ids=repr)
def test_code_shows_the_text_and_nothing_else(text):
    found = [token for token in tokens(f"x {code(text)} y") if token.type not in ("paragraph_open",)]
    assert [token.type for token in found if token.type.startswith(("html", "link", "image"))] == []
    assert sum(token.type == "code_inline" for token in found) == 1


@settings(derandomize=True, deadline=None, max_examples=200)
@given(MARKUP)
def test_any_text_stays_text(text):
    for shown in (code(text), plain(text)):
        markdown = f"x {shown} y"
        assert "\n" not in markdown
        allowed = {"paragraph_open", "paragraph_close", "inline", "text", "code_inline", "text_special"}
        assert {token.type for token in tokens(markdown)} <= allowed, markdown
    block = PARSER.parse(code_block(text))
    assert [token.type for token in block] == ["fence"]


@settings(derandomize=True, deadline=None, max_examples=100)
@given(MARKUP)
def test_a_cell_of_a_table_stays_a_cell(text):
    rows = PARSER.parse(f"| a | b |\n|---|---|\n| {code(text)} | 1 |")
    assert sum(token.type == "td_open" for token in rows) == 2
    assert not any(token.type.startswith("html") for token in rows)


@pytest.fixture(name="model", scope="module")
def _model():
    config = Config().with_values({"network.hidden_size": 8, "network.num_blocks": 1})
    spec = DataSpec(
        name="points",
        kind="points",
        shape=(2,),
        mean=[0.0, 0.0],
        std=[1.0, 1.0],
        range=None,
        columns=("x", "y"),
        clip=(-1.0, 1.0),
        log_snr_window=(-8.0, 3.0),
        fingerprint="0" * 64,
    )
    return TrainedModel(config, spec, build_network(config, (2,)), {})


@pytest.mark.parametrize("text", [text for text in HOSTILE if text], ids=repr)
def test_a_model_card_holds_no_markup_of_others(model, text):
    config = model.config.with_values({"data.name": "/data/" + text, "data.label_column": text})
    provenance = {
        "metrics": {text: 1.0},
        "trial_id": text,
        "decision": [text],
        "command": f"tune.py --data {text}",
        "packages": {"python": text},
        "hardware": {"cpu": text, "cores": 2, "memory_gb": 1.0, "gpus": [text]},
        "git_revision": text,
        "git_clean": False,
    }
    hostile = dataclasses.replace(
        model, config=config, data=dataclasses.replace(model.data, name=text), provenance=provenance
    )
    card = model_card(hostile)
    kinds = {token.type for token in tokens(card)}
    assert not kinds & {"html_block", "html_inline", "link_open", "image"}
    headings = [token for token in PARSER.parse(card) if token.type == "heading_open"]
    assert len(headings) == len([t for t in PARSER.parse(model_card(model)) if t.type == "heading_open"]) + 1


def test_a_schedule_that_does_not_reach_the_prior_is_warned_of(model):
    assert "**Warning:**" not in model_card(model)
    short = dataclasses.replace(model, config=model.config.with_values({"schedule.num_train_timesteps": 10}))
    card = model_card(short)
    assert "x_T keeps 0.95 of the data's amplitude" in card and "**Warning:** x_T keeps" in card
