"""Synthetic data: Self-Instruct, and preference pairs by ranking sampled answers.

A writer is an HTTP server (`ServerWriter`) or any function (`FunctionWriter`); the methods do not
depend on a model. A run that was killed can be resumed: see `Journal`.
"""

from jaxalign.commands.synth.config import (
    InstructConfig,
    LocalConfig,
    PreferenceConfig,
    ServerConfig,
    WriterConfig,
)
from jaxalign.commands.synth.instruct import SelfInstruct, Task, read_seed_tasks
from jaxalign.commands.synth.journal import Journal
from jaxalign.commands.synth.preferences import Preferences, read_prompts
from jaxalign.commands.synth.rouge import Pool, common_subsequence, rouge_l, words
from jaxalign.commands.synth.server import ServerError, ServerWriter
from jaxalign.commands.synth.writer import (
    FunctionWriter,
    Reply,
    Request,
    RequestFactory,
    Sampling,
    Writer,
)

__all__ = [
    "FunctionWriter",
    "InstructConfig",
    "Journal",
    "LocalConfig",
    "Pool",
    "PreferenceConfig",
    "Preferences",
    "Reply",
    "Request",
    "RequestFactory",
    "Sampling",
    "SelfInstruct",
    "ServerConfig",
    "ServerError",
    "ServerWriter",
    "Task",
    "Writer",
    "WriterConfig",
    "common_subsequence",
    "read_prompts",
    "read_seed_tasks",
    "rouge_l",
    "words",
]
