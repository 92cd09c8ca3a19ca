"""Settings that make no sense are refused by name."""

import pytest

from retain.train_config import TrainConfig


def test_bad_settings_name_the_field() -> None:
    for field, value in (("learning_rate", 0.0), ("max_length", -1), ("warmup_ratio", 2.0), ("eval_steps", -1)):
        with pytest.raises(ValueError, match=f"{field}: expected"):
            TrainConfig(**{field: value})
    with pytest.raises(ValueError, match="no effect without eval_steps"):
        TrainConfig(early_stopping_patience=2)
