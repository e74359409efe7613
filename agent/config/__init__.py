"""Every setting: what there is (sections, methods, kafka, fleet), and how it is read (loading). No torch.

Components take their own section or plain arguments, never the whole configuration. The environment is read where a
command starts and handed to `load`; nothing below asks it again.
"""

from agent.config.fleet import Fleet
from agent.config.kafka import Kafka, KafkaImages, KafkaSecurity, ServeKafka
from agent.config.loading import load, resolved, to_toml
from agent.config.methods import Finetune, Gapstream, Lora, Method, MgClip, Seca, VrLwf
from agent.config.sections import (
    Agent,
    Archive,
    Config,
    Evaluation,
    Http,
    Model,
    Release,
    Serve,
    Source,
    Spool,
    State,
    Task,
    Triton,
)
from agent.config.training import Training
from agent.errors import ConfigError

__all__ = [
    "Agent", "Archive", "Config", "ConfigError", "Evaluation", "Finetune", "Fleet", "Gapstream", "Http", "Kafka",
    "KafkaImages", "KafkaSecurity", "Lora", "Method", "MgClip", "Model", "Release", "Seca", "Serve", "ServeKafka",
    "Source", "Spool", "State", "Task", "Training", "Triton", "VrLwf", "load", "resolved", "to_toml",
]  # fmt: skip
