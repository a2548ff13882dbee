"""Zero-shot tasks. Without network, so the task and its data are made here."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dfrot
from dfrot.evaluation.run import Measurement, evaluate
from dfrot.evaluation.zero_shot import scores
from dfrot.system.errors import SetupError, UserError
from tests.tiny_models import write_tiny_model

Tiny = Callable[[str], Path]
QUESTIONS = [
    {"question": "the cat sat on", "choices": [" the mat", " a dog that ran", " it"], "answer": 0},
    {"question": "two and two", "choices": [" are five", " are four", " sing"], "answer": 1},
    {"question": "grass is", "choices": [" blue", " loud and blue", " green"], "answer": 2},
    {"question": "ice is", "choices": [" hot", " cold", " a number"], "answer": 1},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
target_delimiter: ""
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
metadata: {{version: 1.0}}
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two tasks of the same questions."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    for name in ("tiny_one", "tiny_two"):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data))
    return folder


@torch.no_grad()
def accuracies(path: Path) -> tuple[float, float]:
    """By definition: the choice of the greatest log-likelihood, and of the greatest by character."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    plain, normed = [], []
    for item in QUESTIONS:
        likelihoods = []
        for choice in item["choices"]:  # type: ignore[attr-defined]
            context = tokenizer(item["question"]).input_ids
            ids = torch.tensor(context + tokenizer(choice).input_ids)
            logs = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
            likelihoods.append(float(logs[len(context) - 1 :].sum()))
        lengths = [len(choice) for choice in item["choices"]]  # type: ignore[attr-defined]
        plain.append(max(range(3), key=lambda i: likelihoods[i]) == item["answer"])
        normed.append(max(range(3), key=lambda i: likelihoods[i] / lengths[i]) == item["answer"])
    return sum(plain) / 4, sum(normed) / 4


@pytest.mark.parametrize("quantized", [False, True])
def test_accuracies_are_those_of_the_definition(tiny: Tiny, tmp_path: Path, tasks: Path, quantized: bool) -> None:
    path = tiny("llama")
    if quantized:
        path = dfrot.quantize(path, dfrot.Recipe.parse("quarot", "rtn", "w8a16kv16"), tmp_path / "out").path
    measurement = Measurement(tasks=("tiny_one", "tiny_two"), task_path=str(tasks))
    record = evaluate(str(path), measurement)
    loaded = path
    acc, acc_norm = accuracies(loaded)
    for name in ("tiny_one", "tiny_two"):
        assert (record.metrics[f"acc/{name}"], record.metrics[f"acc_norm/{name}"]) == (acc, acc_norm)
    assert record.metrics["zero_shot_average"] == acc_norm
    assert record.conditions["examples"] == {"tiny_one": 4, "tiny_two": 4}
    limited = evaluate(str(path), Measurement(tasks=("tiny_one",), task_path=str(tasks), limit=2))
    assert limited.conditions["examples"] == {"tiny_one": 2}
    assert "zero_shot_average" not in limited.metrics


def test_unknown_tasks_and_folders_are_said(tiny: Tiny, tasks: Path) -> None:
    path = str(tiny("llama"))
    with pytest.raises(UserError, match="has no task 'no_such_task'"):
        evaluate(path, Measurement(tasks=("no_such_task",)))
    with pytest.raises(UserError, match="no folder of tasks"):
        evaluate(path, Measurement(tasks=("tiny_one",), task_path=str(tasks / "none")))
    with pytest.raises(UserError, match="--limit is at least 1"):
        Measurement(tasks=("tiny_one",), task_path=str(tasks), limit=0)
    (tasks / "utils.py").write_text("import not_there\n")
    broken = (tasks / "tiny_one.yaml").read_text().replace("task: tiny_one", "task: tiny_broken")
    (tasks / "broken.yaml").write_text(broken + "process_docs: !function utils.f\n")
    with pytest.raises(SetupError, match=r"lm-eval cannot run tiny_broken: .*not_there"):
        evaluate(path, Measurement(tasks=("tiny_broken",), task_path=str(tasks)))


def test_groups_and_tags_without_a_metric_stand_for_their_tasks(tiny: Tiny, tasks: Path) -> None:
    for name in ("tiny_one", "tiny_two"):
        file = tasks / f"{name}.yaml"
        file.write_text(file.read_text() + "tag: tiny_tag\n")
    (tasks / "group.yaml").write_text("group: tiny_group\ntask: [tiny_one, tiny_two]\n")
    mean = "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    (tasks / "mean.yaml").write_text(f"group: tiny_mean\ntask: [tiny_one, tiny_two]\n{mean}")
    found = {}
    for asked in ("tiny_tag", "tiny_group", "tiny_mean"):
        found[asked] = evaluate(str(tiny("llama")), Measurement(tasks=(asked,), task_path=str(tasks))).metrics
    assert found["tiny_tag"] == found["tiny_group"]
    assert found["tiny_tag"].keys() == {
        *(f"{metric}/{task}" for metric in ("acc", "acc_norm") for task in ("tiny_one", "tiny_two")),
        "zero_shot_average",
    }
    assert found["tiny_mean"] == {"acc/tiny_mean": found["tiny_tag"]["acc/tiny_one"]}


def test_every_way_of_reading_an_answer_is_kept() -> None:
    """gsm8k has two, triviaqa one that is not lm-eval's "none"."""
    found = {
        "results": {
            "gsm8k": {"alias": "gsm8k", "exact_match,strict": 0.25, "exact_match,flexible": 0.5}
            | {"exact_match_stderr,strict": 0.1, "exact_match_stderr,flexible": 0.2},
            "triviaqa": {"exact_match,remove_whitespace": 0.75},
            "both": {"acc,none": 0.5, "acc,strict": 0.25, "count,none": 3},
            "nothing": {"alias": "nothing", "bypass,none": "N/A"},
        },
        "n-samples": {},
    }
    metrics, said = scores(found, {"gsm8k": ["gsm8k"], "triviaqa": ["triviaqa"], "tag": ["triviaqa", "both"]})
    read = {"exact_match@strict/gsm8k": 0.25, "exact_match@flexible/gsm8k": 0.5, "exact_match/triviaqa": 0.75}
    read |= {"acc/both": 0.5, "acc@strict/both": 0.25, "count/both": 3}
    assert metrics == read
    assert said["standard_errors"] == {"exact_match@strict/gsm8k": 0.1, "exact_match@flexible/gsm8k": 0.2}
    with pytest.warns(UserWarning, match="'nothing' has no metric that is a number"):
        assert scores(found, {"nothing": ["nothing"], "triviaqa": ["triviaqa"]})[0] == {"exact_match/triviaqa": 0.75}


def test_the_average_takes_acc_norm_where_it_is_defined() -> None:
    found = {
        "results": {
            "a": {"alias": "a", "acc,none": 0.5, "acc_norm,none": 0.25, "acc_norm_stderr,none": 0.1},
            "b": {"acc,none": 0.75, "perplexity,none": 30.0},
        },
        "n-samples": {"a": {"original": 9, "effective": 4}, "b": {"original": 9, "effective": 9}},
    }
    assert scores(found, {"a": ["a"], "b": ["b"]}) == (
        {"acc/a": 0.5, "acc_norm/a": 0.25, "acc/b": 0.75, "perplexity/b": 30.0, "zero_shot_average": 0.5},
        {"standard_errors": {"acc_norm/a": 0.1}, "examples": {"a": 4, "b": 9}},
    )


@pytest.mark.parametrize(("broken", "message"), [("weights", "logits are NaN"), ("tokens", "none for token")])
def test_nan_and_tokens_beyond_the_embedding_are_the_users_mistake(
    tmp_path: Path, tasks: Path, broken: str, message: str
) -> None:
    path = write_tiny_model("qwen2", tmp_path / "model")
    if broken == "weights":
        model = AutoModelForCausalLM.from_pretrained(path)
        model.model.norm.weight.data[:] = 1e38  # finite, as files have to be
        model.lm_head.weight.data[:] = 1e38
        model.save_pretrained(path)
    else:
        tokenizer = AutoTokenizer.from_pretrained(path)
        tokenizer.add_tokens(["the"])
        tokenizer.save_pretrained(path)
    with pytest.raises(UserError, match=message):
        evaluate(str(path), Measurement(tasks=("tiny_one",), task_path=str(tasks)))
