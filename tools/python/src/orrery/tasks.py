"""This project's own tasks as Gymnasium environments."""

from __future__ import annotations

from typing import Any

from orrery.errors import ConfigError


def make(task: str, **arguments: Any) -> Any:
    """A gymnasium.Env of a task of this project, for example "cheetah_run" or "point_pixels"; `orrery env`, a child process,
    simulates it. Observations are dictionaries of modalities (pictures uint8 [height, width, channels], vectors float32),
    actions numbers in [-1, 1] or choices. A time limit is a truncation.

    image_size (64): height and width of the agent's picture. action_repeat (1): simulator steps per action, their rewards
    summed. time_limit (0): simulator steps of an episode; 0: the task's own. quality ("fast"): or "reference", drawn as
    dm_control draws. render_mode (None): "rgb_array" for pictures for people, of `height` (240) times `width` (320). program:
    the program `orrery`, else it is found in $ORRERY_BIN_DIR or on the PATH. timeout (60): seconds after which an environment
    has failed.

    ConfigError says which task or argument is wrong, or that Gymnasium is missing."""
    gymnasium, task_id = _gymnasium()
    return gymnasium.make(task_id, task=task, **arguments)


def make_vec(task: str, num_envs: int = 1, **arguments: Any) -> Any:
    """A gymnasium.vector.VectorEnv of `num_envs` environments, 1 to 1024, that step in parallel. Arguments as of `make`, and
    autoreset_mode: a gymnasium.vector.AutoresetMode or its name, "NEXT_STEP" (the default), "SAME_STEP" or "DISABLED"."""
    gymnasium, task_id = _gymnasium()
    return gymnasium.make_vec(task_id, num_envs=num_envs, vectorization_mode="vector_entry_point", task=task, **arguments)


def _gymnasium() -> tuple[Any, str]:
    try:
        import gymnasium

        from orrery.gymnasium_tasks import TASK_ID
    except ImportError as error:
        raise ConfigError(f"Gymnasium 1.1 or newer is needed: pip install 'orrery[gymnasium]' ({error})") from error
    return gymnasium, TASK_ID
