"""The heads of an encoder: which `transformers` class answers for its tasks, made from the one that was loaded.

A model keeps one class from beginning to end: `...ForSequenceClassification` or `...ForTokenClassification` where any
of its tasks has labels, else `...ForMaskedLM`. A classifier that also learns from text has the masked language model's
head beside its own, under the name that it has in that class; so `transformers` loads either from the same folder.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from retain.data.labels import Kind
from retain.errors import CompatibilityError, ModelError
from retain.models.encoder_classes import Plan, bare, classifiers, kind_of, name_rows, plan_of, resize, spread, type_of
from retain.models.family import pretrained
from retain.models.head import output_head
from retain.types import Task

__all__ = ["beside", "equipped", "masked_model", "shell_of"]


def equipped(
    model: nn.Module, tasks: Sequence[Task], *, per_task: bool, seed: int, saved: Path | None = None
) -> nn.Module:
    """The base model with heads for all tasks: without a row, or with those that it was loaded with or a stage has.

    Args:
        model: as it was loaded.
        tasks: what it has learned or will learn.
        per_task: does each task have a head of its own?
        seed: of new weights.
        saved: the weights' folder of the stage whose weights are loaded next.

    Raises:
        CompatibilityError: the tasks need heads that no one class of `transformers` has.
    """
    own = pretrained(model)
    kept: dict[str, Any] = json.loads((saved / "config.json").read_text("utf-8")) if saved else own.config.to_dict()
    given = kind_in(kept)
    kinds: set[Kind] = {kind_of(task) for task in tasks}
    if given is not None:
        kinds.add(given)
    wanted: list[Kind] = [kind for kind in sorted(kinds) if kind]
    if len(wanted) > 1:
        raise CompatibilityError(
            "these tasks need different heads, and a model has one",
            problems=[f"task {task.name}: {kind_of(task) or 'text'}" for task in tasks],
            hint="learn tasks of one label a row, of many labels a row, and of a label a word in lineages of their own",
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = with_classifier(own, wanted.pop(), masked="" in kinds) if wanted else with_masked_head(own)
    plan = plan_of(made)
    if saved:
        earlier = Plan(**kept.get("retain", {}))
        plan = replace(earlier, heads=list(dict.fromkeys([*plan.heads, *earlier.heads])))
    keep(made.config, replace(plan, per_task=per_task))
    made.config.architectures = [type(made).__name__]  # saved beside an adapter, too
    if saved and given:
        names = [label for _, label in sorted((int(row), label) for row, label in kept["id2label"].items())]
        for layer in classifiers(made):
            resize(layer, names, seed=seed, std=spread(made))
        name_rows(made, names)
    return made.eval()


def kind_in(config: Mapping[str, Any]) -> Kind | None:
    """What a saved model labels; nothing where it guesses hidden tokens; None where it has no head."""
    name = "".join(config.get("architectures") or [])
    if name.endswith("ForTokenClassification"):
        return "tokens"
    if name.endswith("ForSequenceClassification"):
        return "multi" if config.get("problem_type") == "multi_label_classification" else "single"
    return "" if name.endswith(("ForMaskedLM", "ForPreTraining")) else None


def keep(config: PretrainedConfig, plan: Plan) -> None:
    """Write the plan into the configuration, which `transformers` saves with what it does not know."""
    vars(config)["retain"] = asdict(plan)


def with_classifier(model: PreTrainedModel, kind: Kind, *, masked: bool) -> PreTrainedModel:
    """A classifier over the model's encoder, without any row yet; or the model, if it is one.

    Args:
        model: as it was loaded.
        kind: what it will label.
        masked: will it learn from text, too?
    """
    auto = AutoModelForTokenClassification if kind == "tokens" else AutoModelForSequenceClassification
    made, heads = model, ["classifier"]
    if type_of(model) not in ("sequence", "token"):
        made = cast("PreTrainedModel", auto.from_config(model.config, dtype=model.dtype))
        heads += move_encoder(model, made)
        for layer in classifiers(made):
            resize(layer, [], seed=0, std=0.0)
        name_rows(made, [])
    if not classifiers(made):
        raise ModelError(
            f"{type(made).__name__} names no layer `classifier`",
            hint="use an encoder of the kind of BERT, RoBERTa, DistilBERT, ELECTRA or DeBERTa",
        )
    if kind == "multi":
        made.config.problem_type = "multi_label_classification"
    if masked:
        language = with_masked_head(model)
        heads += plan_of(language).heads
        attach(made, language)
    keep(made.config, Plan(heads))
    return made


def with_masked_head(model: PreTrainedModel) -> PreTrainedModel:
    """The masked language model over the model's encoder; or the model, if it is one."""
    if type_of(model) == "masked":
        return model
    made = cast("PreTrainedModel", AutoModelForMaskedLM.from_config(model.config, dtype=model.dtype))
    move_encoder(model, made)
    output = output_head(made)
    encoder = encoder_name(made)
    parts = [(name, part) for name, part in made.named_children() if name != encoder]
    keep(made.config, Plan([name for part in parts for name in without(output, *part)]))
    return made


def without(inner: nn.Module, name: str, module: nn.Module) -> Iterator[str]:
    """The largest parts of a module that have parameters and do not hold the inner one."""
    if inner not in module.modules():
        yield from [name] if list(module.parameters()) else []
    elif module is not inner:
        for key, part in module.named_children():
            yield from without(inner, f"{name}.{key}", part)


def encoder_name(model: PreTrainedModel) -> str:
    """The name of the encoder in a model with a head."""
    return next(name for name, module in model.named_children() if module is model.base_model)


def move_encoder(model: PreTrainedModel, made: PreTrainedModel) -> list[str]:
    """Give a new model the weights of a model's encoder.

    Returns:
        the parts of it that got none, because the model had none (the pooler of a masked language model).
    """
    result = made.base_model.load_state_dict(model.base_model.state_dict(), strict=False)
    parameters = dict(made.base_model.named_parameters())
    missing = {key.split(".")[0] for key in result.missing_keys if key in parameters}
    made.tie_weights()
    return [f"{encoder_name(made)}.{part}" for part in sorted(missing)]


class Shell:
    """A masked language model around the encoder of a classifier; no module, so that nothing is counted twice.

    Args:
        model: the masked language model.
        names: the parts of its head, which the classifier has under the same names.
    """

    def __init__(self, model: PreTrainedModel, names: Sequence[str]) -> None:
        self.model, self.names = model, names

    def around(self, classifier: PreTrainedModel) -> PreTrainedModel:
        """The masked language model of the classifier's encoder and of its parts, which PEFT may have replaced."""
        setattr(self.model, encoder_name(self.model), classifier.base_model)
        for name in self.names:
            setattr(self.model, name, classifier.get_submodule(name))
        self.model.training = classifier.training
        return self.model


def attach(classifier: PreTrainedModel, language: PreTrainedModel) -> None:
    """Put the masked language model's head beside the classifier's.

    Raises:
        CompatibilityError: both classes use one name for different parts.
    """
    encoder = encoder_name(language)
    names = [name for name, part in language.named_children() if name != encoder and list(part.parameters())]
    if taken := sorted(set(names) & {name for name, _ in classifier.named_children()}):
        raise CompatibilityError(
            f"{type(classifier).__name__} cannot learn from text too: both heads are called {', '.join(taken)}",
            hint="learn the text in a lineage of its own, and start the next one from its export",
        )
    for name in names:
        classifier.add_module(name, language.get_submodule(name))
    shell = Shell(language, names)
    shell.around(classifier)
    language.tie_weights()
    vars(classifier)["masked"] = shell
    vars(classifier)["_tied_weights_keys"] = vars(type(language)).get("_tied_weights_keys")


def shell_of(model: nn.Module) -> Shell | None:
    """The masked language model around a classifier's encoder, if it has one."""
    return vars(bare(model)).get("masked")


def beside(model: nn.Module) -> list[str]:
    """The linear layers of a masked language model's head that lies beside a classifier."""
    shell = shell_of(model)
    return [
        name
        for name, module in bare(model).named_modules()
        if shell is not None and name.split(".")[0] in shell.names and isinstance(module, nn.Linear)
    ]


def masked_model(model: nn.Module) -> nn.Module:
    """The masked language model of an encoder.

    Raises:
        CompatibilityError: it has none.
    """
    if type_of(model) == "masked":
        return model
    shell = shell_of(model)
    if shell is None:
        raise CompatibilityError(
            "the model has no head for masked language modelling, so it cannot read raw text",
            hint="name the text as a task of the recipe (which makes the head), or leave it out",
        )
    return shell.around(bare(model))
