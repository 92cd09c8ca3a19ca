"""The demonstration: three made-up skills learned in a row, once without protection and once with it.

Both runs start from the embedded default model, take the same number of optimizer steps and share the base's scores.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from retain.config import load_config
from retain.config.recipe import write_recipe
from retain.demo_tasks import write_demo_tasks
from retain.lineage import Lineage
from retain.run import train
from retain.trainer import Observer

__all__ = ["RUNS", "run_demo"]

log = logging.getLogger("retain")

TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The model's own chat template without the system turn that it puts before every question: half the tokens."""

RUNS: dict[str, list[dict[str, object]]] = {
    "sequential": [{"name": "sequential"}],
    "protected": [{"name": "replay", "ratio": 0.25, "capacity": 400}],
}
"""The strategy of each run."""


def run_demo(folder: Path, *, observers: Sequence[Observer] = ()) -> list[Lineage]:
    """Learn the demonstration's tasks under each of `RUNS`; what was finished before is not done again.

    Args:
        folder: where data, recipes and lineages go.
        observers: called after every optimizer step.
    """
    folder = folder.resolve()  # a recipe's relative paths start from the recipe
    tasks = write_demo_tasks(folder / "data")
    lineages: list[Lineage] = []
    for name, strategy in RUNS.items():
        recipe = folder / f"{name}.yaml"
        recipe.write_text(
            write_recipe(
                {
                    "title": name,
                    "model": {"name": "smollm2-135m", "template": TEMPLATE},
                    "method": {"name": "full"},
                    "strategy": strategy if len(strategy) > 1 else strategy[0],
                    "tasks": [{**task, "max_new_tokens": 20} for task in tasks],
                    "train": {
                        "learning_rate": 1e-4,
                        "max_steps": 36,
                        "per_device_train_batch_size": 8,
                        "max_length": 96,
                    },
                    "evaluation": {"max_probes": 88, "max_texts": 8},
                    "output_dir": name,
                }
            ),
            encoding="utf-8",
        )
        log.info("demo: the three tasks with %s", name)
        config = load_config(recipe).config
        lineages.append(train(config, observers=observers, base=lineages[0] if lineages else None))
    return lineages
