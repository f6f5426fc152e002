"""`recurgolf.load` and `recurgolf sample`: a finished run in one's hands."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from command_line import recurgolf as command
from smoke_runs import train

import recurgolf
from recurgolf.config import ConfigError
from recurgolf.loaded import Loaded, choose
from recurgolf.model.norm import rms_norm

PROMPT = "The history of the city"
LOOPED = ("looping=cycle", "looping.passes=3", "lora.rank=2")


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return recurgolf.load(train(*LOOPED).path)


def test_evaluating_gives_the_summary_s_digits_and_changes_nothing(loaded):
    before = {name: w.clone() for name, w in loaded.model.state_dict().items()}
    score = loaded.evaluate()
    told = train(*LOOPED).summary
    assert (score.val_bpb, score.val_loss) == (told["val_bpb"], told["val_loss"])
    assert all(torch.equal(w, before[name]) for name, w in loaded.model.state_dict().items())


def test_another_protocol_scores_as_the_verb_does(loaded, tmp_path):
    folder = shutil.copytree(loaded.folder, tmp_path / "run")
    asked = ["eval=sliding", "eval.stride=32"]
    ended = command("evaluate", folder, *asked, "--json", cwd=tmp_path).finished()
    assert f'"val_bpb": {loaded.evaluate(*asked).val_bpb!r}' in ended.out


def test_an_exported_folder_is_the_same_model(loaded, tmp_path):
    command("export", loaded.folder, tmp_path / "out", cwd=tmp_path).finished()
    exported = recurgolf.load(tmp_path / "out")
    assert torch.equal(exported.logits(PROMPT), loaded.logits(PROMPT))


def test_a_run_without_an_artifact_has_its_checkpoint_s_weights(loaded, tmp_path):
    folder = shutil.copytree(loaded.folder, tmp_path / "run")
    (folder / "artifact.bin").unlink()
    before = recurgolf.load(folder)
    assert "checkpoints" in before.source
    told = train(*LOOPED).summary["pre_quant_val_bpb"]
    assert before.evaluate().val_bpb == told


def test_states_are_what_the_blocks_gave_and_the_last_one_gives_the_logits(loaded):
    given: list[torch.Tensor] = []
    hooks = [
        block.register_forward_hook(lambda module, inputs, output: given.append(output[0].detach()))
        for block in loaded.model.blocks
    ]
    states = loaded.states(PROMPT)
    for hook in hooks:
        hook.remove()
    assert len(states) == loaded.plan.num_visits == 3 * len(loaded.model.blocks)
    assert torch.equal(states, torch.stack(given))
    last = rms_norm(states[-1], loaded.model.config.norm_eps)
    assert torch.equal(loaded.model.logits(last).float(), loaded.logits(PROMPT))
    assert len(loaded.states(PROMPT, passes=1)) == len(loaded.model.blocks)


def test_logits_score_a_text_as_the_protocol_does(loaded):
    """Nats of a text by its logits, against ScoredModel.nats, which protocols call."""
    ids = torch.tensor(loaded.ids(PROMPT))
    own = torch.nn.functional.cross_entropy(loaded.logits(PROMPT)[:-1], ids[1:], reduction="none")
    with torch.no_grad():
        theirs = loaded._scored_model.nats(ids[None], 0, loaded.plan)[0]
    assert torch.allclose(own, theirs, atol=1e-6)


def test_without_chance_the_likeliest_token_follows(loaded):
    text = loaded.sample(PROMPT, temperature=0, tokens=12)
    ids = loaded.ids(PROMPT)
    for _ in range(12):  # written out: the whole logits, in one window
        with torch.no_grad():
            logits = loaded.model(torch.tensor([ids]), loaded.plan)[0, -1]
        # Pieces without a text are never said: ids 0, 2 and 3 of the challenge's tokenizers.
        logits[[0, 2, 3]] = -math.inf
        if int(logits.argmax()) == loaded.tokenizer.bos_id:
            break
        ids.append(int(logits.argmax()))
    assert text.startswith(PROMPT) and loaded.ids(text) == ids


def test_a_seed_is_one_text_and_others_are_others(loaded):
    texts = [loaded.sample(PROMPT, tokens=10, seed=seed) for seed in (0, 0, 1, 2)]
    assert texts[0] == texts[1] and len(set(texts)) == 3
    assert loaded.sample(PROMPT, tokens=10, top_k=1) == loaded.sample(
        PROMPT, tokens=10, temperature=0
    )
    assert loaded.sample(PROMPT, tokens=10, passes=1, temperature=0) != loaded.sample(
        PROMPT, tokens=10, passes=3, temperature=0
    )


def test_tokens_come_as_often_as_temperature_and_top_k_say():
    logits, chance = torch.tensor([1.0, 3.0, 2.0, 0.0, 3.5]), torch.Generator().manual_seed(5)
    drawn = [choose(logits, 2.0, 3, chance) for _ in range(4000)]
    weights = {index: math.exp(value / 2) for index, value in ((4, 3.5), (1, 3.0), (2, 2.0))}
    assert set(drawn) == set(weights)
    for index, weight in weights.items():
        share = weight / sum(weights.values())
        # Five standard deviations.
        assert abs(drawn.count(index) / 4000 - share) < 5 * math.sqrt(share / 4000)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0"),
        ({"tokens": 0}, "tokens=0"),
        ({"passes": 0}, "passes=0"),
        ({"seed": -1}, "seed=-1"),
        ({"temperature": "hot"}, "temperature='hot'"),
    ],
    ids=lambda value: str(value),
)
def test_what_cannot_be_asked_is_refused_in_plain_words(loaded, asked, said):
    with pytest.raises(ConfigError, match=said):
        loaded.sample(PROMPT, **asked)


def test_what_is_no_run_and_what_is_no_evaluation_are_refused(loaded, tmp_path):
    with pytest.raises(ConfigError, match="is not a run folder"):
        recurgolf.load(tmp_path)
    with pytest.raises(ConfigError, match="takes overrides of eval and data"):
        loaded.evaluate("model.dim=3")
    with pytest.raises(ConfigError, match="expected a text"):
        loaded.logits([1, 2])  # type: ignore[arg-type]


def test_the_verb_prints_what_python_returns(loaded, tmp_path):
    options = ["--tokens", "9", "--temperature", "0.7", "--top-k", "5", "--seed", "3"]
    ended = command("sample", loaded.folder, PROMPT, *options, "--passes", "2", cwd=tmp_path)
    expected = loaded.sample(PROMPT, tokens=9, temperature=0.7, top_k=5, seed=3, passes=2)
    assert ended.finished().out == expected + "\n"
    labelled = command("sample", loaded.folder, "--label", "--tokens", "3", cwd=tmp_path)
    assert "a sample of " in labelled.finished().out
    assert "top_k=0" in command("sample", loaded.folder, "--top-k", "0", cwd=tmp_path).refused()


def test_make_train_ends_with_a_sample():
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    assert "recurgolf sample" in makefile.partition("train: setup")[2].partition("\ntest:")[0]
