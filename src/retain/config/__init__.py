"""What a user chose: recipes and the command line, checked as a whole before anything heavy starts."""

from retain.config.load import LoadedConfig, load_config, settings
from retain.config.run_config import Budget, ModelConfig, RunConfig, check_compatibility, dump_config

__all__ = [
    "Budget",
    "LoadedConfig",
    "ModelConfig",
    "RunConfig",
    "check_compatibility",
    "dump_config",
    "load_config",
    "settings",
]
