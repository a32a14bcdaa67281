"""Clients of Orrery's services, and an actor that plays Gymnasium and dm_env environments.

PlannerClient and Policy ask for actions, ReplayClient and ReplayWriter bring experience (EpisodeRecorder makes its chunks),
Experiment reads and writes configurations, load_snapshot reads what was learned, Services starts the programs on this machine,
make and make_vec give its own tasks to Gymnasium. Calls inside of `with trace(…)` belong to one trace.
"""

from orrery.channel import Tls
from orrery.chunk_codec import decode_rows, encode_rows
from orrery.environments import EnvironmentSettings
from orrery.errors import ConfigError, DataError, EnvironmentFault, OrreryError, ServiceError
from orrery.experiment import Experiment
from orrery.local import Program, Services
from orrery.planner_client import Answer, PlannerClient, ServedModel, Slot
from orrery.policy import Policy
from orrery.recorder import EpisodeRecorder
from orrery.replay_client import Chunk, Episode, EpisodeEnd, EpisodeMode, ReplayClient
from orrery.replay_writer import ReplayWriter
from orrery.snapshot import Snapshot, load_snapshot
from orrery.specification import ActionSpec, EnvironmentSpec, TensorSpec, model_text
from orrery.tasks import make, make_vec
from orrery.tracing import Trace, trace

__version__ = "0.1.0"

__all__ = [
    "ActionSpec",
    "Answer",
    "Chunk",
    "ConfigError",
    "DataError",
    "EnvironmentFault",
    "EnvironmentSettings",
    "EnvironmentSpec",
    "Episode",
    "EpisodeEnd",
    "EpisodeMode",
    "EpisodeRecorder",
    "Experiment",
    "OrreryError",
    "PlannerClient",
    "Policy",
    "Program",
    "ReplayClient",
    "ReplayWriter",
    "ServedModel",
    "ServiceError",
    "Services",
    "Slot",
    "Snapshot",
    "TensorSpec",
    "Tls",
    "Trace",
    "decode_rows",
    "encode_rows",
    "load_snapshot",
    "make",
    "make_vec",
    "model_text",
    "trace",
]
