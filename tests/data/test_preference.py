"""Preferences from rows to batches: what a pair is, where it is cut, and that it stays together."""

from functools import partial

import numpy as np
import pytest

from jaxtrain.data import BatchShape, HuggingFaceSource, TrainingData
from jaxtrain.data.preference import (
    DPODataFactory,
    KTODataFactory,
    PreferenceEncoder,
    read_judged,
    read_pair,
)
from jaxtrain.recipe.data import HFDataSourceConfig
from jaxtrain.recipe.errors import DataError, RecipeError
from jaxtrain.recipe.objectives import JudgedDataConfig, PreferenceDataConfig
from tests.data.made import jsonl
from tests.tiny import GENERATION, PLAIN, THINK, chat, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("cache")


def user(text):
    return {"role": "user", "content": text}


def reply(text):
    return {"role": "assistant", "content": text}


def turns(row):
    """(prompt, chosen, rejected) as (role, content) pairs."""
    pair = read_pair(row)
    return [[(m["role"], m["content"]) for m in part] for part in (pair.prompt, *pair.replies)]


A = [("user", "a")], [("assistant", "b")], [("assistant", "c")]
FORMS = {
    "texts": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "lists": {"prompt": [user("a")], "chosen": [reply("b")], "rejected": [reply("c")]},
    "single turns": {
        "conversations": [{"from": "human", "value": "a"}],
        "chosen": {"from": "gpt", "value": "b"},
        "rejected": {"from": "gpt", "value": "c"},
    },
    "no prompt": {"chosen": [user("a"), reply("b")], "rejected": [user("a"), reply("c")]},
    "the prompt beside whole conversations": {
        "prompt": "a",
        "chosen": [user("a"), reply("b")],
        "rejected": [user("a"), reply("c")],
    },
}


@pytest.mark.parametrize("row", FORMS.values(), ids=FORMS)
def test_every_form_gives_the_same_pair(row):
    assert turns(row) == list(A)


def test_what_both_begin_with_is_the_prompt():
    start = chat("a", "b", "c", system="s")
    row = {"chosen": [*start, reply("d")], "rejected": [*start, reply("e")]}
    prompt, chosen, rejected = turns(row)
    assert [content for _, content in prompt] == ["s", "a", "b", "c"]
    assert (chosen, rejected) == ([("assistant", "d")], [("assistant", "e")])


def test_texts_without_a_prompt_share_whole_words():
    prompt, chosen, rejected = turns({"chosen": "what is 2? 24", "rejected": "what is 2? 23"})
    assert prompt == [("user", "what is 2? ")]
    assert (chosen, rejected) == ([("assistant", "24")], [("assistant", "23")])


def test_a_system_column_comes_before_the_prompt():
    prompt, *_ = turns({**FORMS["texts"], "system": "s"})
    assert prompt == [("system", "s"), ("user", "a")]


FAULTS = {
    "missing": ({"prompt": "a", "chosen": "b"}, "no column 'rejected', found prompt, chosen"),
    "near": (
        {"prompt": "a", "chosen": "b", "rejectd": "c"},
        "no column 'rejected', found prompt, chosen, rejectd; did you mean `rejectd`?",
    ),
    "judged": (
        {"prompt": "a", "completion": "b", "label": True},
        "no column 'chosen', found prompt, completion, label; judged records need data.type: kto",
    ),
    "type": (FORMS["texts"] | {"chosen": 3}, "chosen: must be text or a list of turns, found 3"),
    "role": (
        FORMS["texts"] | {"rejected": [{"role": "asistant", "content": "c"}]},
        "rejected[0].role: unknown role 'asistant'; known are system, developer, user, assistant, "
        "tool, function, ipython; did you mean `assistant`?",
    ),
    "no prompt": (
        {"chosen": "b", "rejected": "c"},
        "no prompt, and chosen and rejected begin differently",
    ),
    "two prompts": (
        {"chosen": [user("a"), reply("b")], "rejected": [user("x"), reply("c")]},
        "chosen and rejected begin differently, and there is no prompt before them",
    ),
    "another prompt": (
        {"prompt": "x", **FORMS["no prompt"]},
        "prompt: must be part of what chosen and rejected begin with",
    ),
    "a reply of the user": (
        {"prompt": "a", "chosen": [reply("b")], "rejected": [user("c")]},
        "rejected: must continue with the assistant's reply, found role 'user'",
    ),
    "score": (
        FORMS["texts"] | {"reference_score_chosen": "high"},
        "reference_score_chosen: must be a number, found 'high'",
    ),
}


@pytest.mark.parametrize(("row", "message"), FAULTS.values(), ids=FAULTS)
def test_a_faulty_pair_names_its_field(row, message):
    with pytest.raises(DataError) as error:
        read_pair(row)
    assert str(error.value) == message


def encoded(row, template=None, **keys):
    tokenizer = tiny_tokenizer(template) if template else tiny_tokenizer()
    limits = {"max_length": 500, "max_prompt_length": 400, "prompt_truncation": "keep_start"}
    encoder = PreferenceEncoder(
        tokenizer, is_paired="label" not in row, **limits | {"overlong": "truncate"} | keys
    )
    (outcome,) = encoder.encode([encoder.read(row)])
    return outcome


def sides(outcome):
    """(tokens, weights) of chosen and of rejected."""
    return [
        (outcome.tokens[part].tolist(), outcome.weights[part].tolist())
        for part in (slice(outcome.rejected_start), slice(outcome.rejected_start, None))
    ]


def trained(outcome):
    tokenizer = tiny_tokenizer()
    return [
        tokenizer.decode([t for t, weight in zip(*side, strict=True) if weight])
        for side in sides(outcome)
    ]


ROW = {"prompt": "what is it?", "chosen": "a river that summer", "rejected": "no"}


@pytest.mark.parametrize("template", [None, PLAIN, THINK, GENERATION])
def test_a21_both_sequences_are_the_tokens_of_their_whole_text(template):
    """Trap A21: also where the tokenizer merges the prompt's last blank into the reply."""
    outcome = encoded(ROW, template)
    tokenizer = tiny_tokenizer(template) if template else tiny_tokenizer()
    for name, (tokens, weights) in zip(("chosen", "rejected"), sides(outcome), strict=True):
        messages = chat(ROW["prompt"], ROW[name])
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert tokens == tokenizer(text, add_special_tokens=False)["input_ids"]
        shown = tokenizer.decode([t for t, w in zip(tokens, weights, strict=True) if w])
        assert ROW[name] in shown and ROW["prompt"] not in shown


def test_only_the_reply_is_trained():
    start = chat("a", "an earlier answer", "b")
    row = {"prompt": start, "chosen": [reply("yes")], "rejected": [reply("no")]}
    assert trained(encoded(row)) == ["yes<|im_end|>", "no<|im_end|>"]


def lengths(outcome):
    """(prompt, reply) tokens of each side; the reply begins where training does."""
    found = []
    for _, weights in sides(outcome):
        found.append((weights.index(1), len(weights) - weights.index(1)))
    return found


def prompt_length():
    return lengths(encoded(ROW))[0][0]


def test_a20_a_reply_uses_all_room_that_the_prompt_left():
    """Trap A20: a limit of the prompt that the prompt is far from takes nothing from the reply."""
    size = prompt_length()
    most = size + 3
    outcome = encoded(ROW, max_length=most, max_prompt_length=most - 2)
    assert lengths(outcome) == [(size, 3), (size, 3)] and outcome.truncated


def test_a19_no_limit_leaves_a_reply_empty():
    """Trap A19: the prompt is cut first, and only where the whole is too long."""
    whole = lengths(encoded(ROW))
    size = prompt_length()
    for most in range(2, size + 12):
        is_cut = max(map(sum, whole)) > most
        for limit in range(1, most):
            kept = min(size, limit) if is_cut else size
            found = lengths(encoded(ROW, max_length=most, max_prompt_length=limit))
            assert found == [(kept, min(reply, most - kept)) for _, reply in whole]
            assert all(reply > 0 for _, reply in found)


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_either_end_of_a_prompt_survives_and_bos_does(mode):
    whole = sides(encoded(ROW))[0][0]
    size = prompt_length()
    outcome = encoded(ROW, max_length=12, max_prompt_length=5, prompt_truncation=mode)
    tokens, _ = sides(outcome)[0]
    assert whole[0] == tiny_tokenizer().bos_token_id
    kept = whole[:5] if mode == "keep_start" else [whole[0], *whole[size - 4 : size]]
    assert tokens == [*kept, *whole[size : size + 7]]


@pytest.mark.parametrize(
    ("overlong", "expected"),
    [("drop", "longer than max_length"), ("error", "tokens, but max_length is 10")],
)
def test_an_overlong_pair_can_be_dropped_or_refused(overlong, expected):
    outcome = encoded(ROW, max_length=10, max_prompt_length=5, overlong=overlong)
    assert expected in outcome[0]


def test_a22_a_reply_of_one_token_trains_and_an_empty_one_is_dropped():
    """Trap A22."""
    outcome = encoded(
        {"prompt": "a", "chosen": "x", "rejected": "y"},
        "{% for m in messages %}{{ m.content }}{% endfor %}",
    )
    assert [side[1] for side in sides(outcome)] == [[0, 1], [0, 1]]
    for empty in ("", "  ", []):
        row = {"prompt": "a", "chosen": empty, "rejected": "y"}
        assert encoded(row).reason == "a reply is empty"


def test_a45_an_equal_pair_is_dropped():
    """Trap A45: also one that is equal only once it is cut."""
    same = {"prompt": "a", "chosen": "b", "rejected": [reply("b")]}
    assert encoded(same).reason == "chosen and rejected are equal"
    late = {"prompt": "a", "chosen": "yes yes yes one", "rejected": "yes yes yes two"}
    size = lengths(encoded(late))[0][0]
    cut = encoded(late, max_length=size + 2, max_prompt_length=size)
    assert cut.reason == "chosen and rejected are equal"


source = partial(jsonl, name="pairs")


def pairs(count):
    return [
        {"prompt": f"number {n}?", "chosen": "yes " * (n % 5 + 1), "rejected": f"no {n}"}
        for n in range(count)
    ]


def prepare(
    sources, evals=None, *, shape=None, max_length=64, factory=DPODataFactory, **keys
) -> TrainingData:
    section = PreferenceDataConfig if factory is DPODataFactory else JudgedDataConfig
    made = factory(section(sources=("x",), **keys), tiny_tokenizer(), max_length)
    return made.prepare(sources, evals or {}, shape or BatchShape(2, 4))


def shown(row, weights):
    return tiny_tokenizer().decode(row[weights > 0])


def test_a_pair_stays_together_in_its_microbatch_chosen_first(tmp_path):
    data = prepare([source(tmp_path, pairs(11))])
    seen = []
    for batch in data.train_batches(0, data.steps_per_epoch):
        assert batch.tokens.shape == (2, 4, 64)
        numbers = batch.rows.reshape(-1, 2)
        assert (numbers[:, 1] == numbers[:, 0] + (numbers[:, 0] >= 0)).all()
        tokens = batch.tokens.reshape(-1, 2, 64)
        weights = batch.loss_weights.reshape(tokens.shape)
        for pair, weight in zip(tokens[numbers[:, 0] >= 0], weights, strict=False):
            chosen, rejected = (shown(*side) for side in zip(pair, weight, strict=True))
            number = int(rejected.removeprefix("no ").removesuffix("<|im_end|>"))
            assert chosen.count("yes") == number % 5 + 1
            seen.append(number)
    assert sorted(seen) == list(range(11)) and seen != sorted(seen)
    assert data.steps_per_epoch == 3 and data.train_rows == 22


def test_a_copy_of_a_pair_is_never_held_out_from_itself(tmp_path):
    rows = [*pairs(10), *pairs(10)]
    data = prepare([source(tmp_path, rows)], train_eval_split=(0.5, 0.5))
    trained, held_out = (
        {plan.documents.index["record"][d] % 10 for d in plan.packing.documents}
        for plan in (data.train, data.evals["eval"])
    )
    assert trained and held_out and not trained & held_out
    assert data.train_rows + data.eval_rows == 40


def test_weights_mix_whole_pairs(tmp_path):
    (tmp_path / "b").mkdir()
    sources = [
        source(tmp_path, pairs(6), weight=1),
        source(tmp_path / "b", pairs(9), weight=2),
    ]
    data = prepare(sources)
    batches = data.train_batches(0, data.steps_per_epoch)
    numbers = np.concatenate([batch.rows.ravel() for batch in batches])
    documents = data.train.packing.documents[numbers[numbers >= 0]]  # a piece is a sequence
    assert (documents[::2] == documents[1::2]).all() and len(documents) == 30
    of_first = np.count_nonzero(data.train.documents.index["source"][documents] == 0)
    assert of_first == 10


@pytest.mark.covers("data.max_prompt_length", "data.dpo_prompt_truncation_mode")
def test_prepared_pairs_are_found_again_and_keys_of_length_are_told_apart(tmp_path):
    rows = source(tmp_path, pairs(4))
    assert "miss" in prepare([rows], max_prompt_length=20).ledger.notes[-1]
    assert "hit" in prepare([rows], max_prompt_length=20).ledger.notes[-1]
    for keys in (
        {"max_prompt_length": 21},
        {"max_prompt_length": 20, "dpo_prompt_truncation_mode": "keep_end"},
        {"max_prompt_length": 20, "overlong": "drop"},
    ):
        assert (
            "miss, the nearest entry differs in data." in prepare([rows], **keys).ledger.notes[-1]
        )


def test_drops_are_counted_and_scores_kept(tmp_path):
    rows = pairs(3)
    rows[1] |= {"reference_score_chosen": -1.5, "reference_score_rejected": -2}
    rows += [{"prompt": "a", "chosen": "b", "rejected": "b"}, {**rows[0], "chosen": ""}]
    data = prepare([source(tmp_path, rows)])
    (counts,) = data.ledger.sources
    assert counts.dropped == {"chosen and rejected are equal": 1, "a reply is empty": 1}
    assert (counts.rows, counts.documents) == (5, 3)
    scores = data.train.documents.index["scores"]
    assert scores[1].tolist() == [-1.5, -2.0] and np.isnan(scores[[0, 2]]).all()
    assert counts.trained_tokens == data.ledger.sets[0].trained_tokens
    batches = data.train_batches(0, data.steps_per_epoch)
    assert counts.trained_tokens == sum(batch.loss_weights.sum() for batch in batches)


def test_a_fault_names_file_line_and_side(tmp_path):
    rows = [*pairs(2), {"prompt": "a", "chosen": "b", "rejected": 3}]
    with pytest.raises(DataError) as error:
        prepare([source(tmp_path, rows)])
    place = f"{tmp_path / 'pairs.jsonl'}:3: rejected: must be text"
    assert str(error.value).startswith(place)
    data = prepare([source(tmp_path, rows)], max_rows_with_errors=1)
    assert data.ledger.sources[0].dropped == {"faulty": 1}


def test_a_limit_of_the_prompt_leaves_room_or_gives_way(tmp_path):
    """Trap A19: a written limit is refused, the default lowered with a note."""
    rows = source(tmp_path, pairs(3))
    with pytest.raises(RecipeError, match="64 leaves no room for a reply in max_length 64"):
        prepare([rows], max_prompt_length=64)
    assert prepare([rows]).ledger.notes[0] == (
        "max_prompt_length is 32, half of max_length, which 4096 does not fit in"
    )
    (note,) = prepare([rows], max_prompt_length=63).ledger.notes
    assert note.startswith("cache: ")


def test_the_effective_recipe_of_a_lowered_limit_runs_again():
    default = PreferenceDataConfig(sources=("x",), max_length=64).model_dump(mode="json")
    assert default["max_prompt_length"] == 4096
    assert PreferenceDataConfig(**default).max_length == 64


def test_known_splits_of_ultrafeedback():
    name = "HuggingFaceH4/ultrafeedback_binarized"
    made = HuggingFaceSource(HFDataSourceConfig(name_or_path=name))
    assert made._rename_split(made.config, "train[:9]") == "train_prefs[:9]"
    assert made._rename_split(made.config, "eval") == "test_prefs"


JUDGED = [
    {"prompt": "is it?", "completion": "yes it is", "label": True},
    {"messages": chat("a", "b", "is it?", "no"), "label": False},
]


def test_judged_rows_are_documents_with_their_label(tmp_path):
    data = prepare([source(tmp_path, JUDGED)], factory=KTODataFactory, shape=BatchShape(1, 2))
    plan = data.train
    assert data.train_rows == 2 and plan.together == 1
    assert plan.documents.index["scores"][:, 0].tolist() == [1.0, 0.0]
    batch = plan.fill_batch(np.arange(2), plan.lengths[-1])
    found = [shown(*side) for side in zip(batch.tokens, batch.loss_weights, strict=True)]
    assert found == ["yes it is<|im_end|>", "no<|im_end|>"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "a", "completion": "b"},
            "no column 'label', found prompt, completion",
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            "no column 'label', found prompt, chosen, rejected; pairs need data.type: dpo",
        ),
        (JUDGED[0] | {"label": 1}, "label: must be true or false, found 1"),
        (JUDGED[0] | {"label": "true"}, "label: must be true or false, found 'true'"),
        ({"messages": [], "label": True}, "messages: empty conversation"),
        (
            {"messages": [reply("b")], "label": True},
            "messages: must have a user turn before the judged reply, found none",
        ),
    ],
)
def test_a_faulty_judgement_names_its_field(row, message):
    with pytest.raises(DataError) as error:
        read_judged(row)
    assert str(error.value) == message


def test_an_empty_judged_reply_is_dropped(tmp_path):
    rows = [*JUDGED, JUDGED[0] | {"completion": ""}]
    data = prepare([source(tmp_path, rows)], factory=KTODataFactory)
    assert data.ledger.sources[0].dropped == {"a reply is empty": 1}
