"""What can be set about a fleet: agents at several sites that answer with what all of them learned."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from agent.config.base import Section

FLEET_METHODS = ("gapstream", "ncm")
"""The methods whose learners a fleet can add up, and whose classes say how many images they are of. They are those of
agent.fleet_states.SCHEMAS, which the configuration cannot import; a test compares the two."""


class Fleet(Section):
    """Agents at several sites publish what they have counted to a topic, and each answers with what all of them
    learned; no image leaves a site. The cluster and its security are those of [source.kafka]. Each goes on learning its
    own stream, and works on with what it has while the others are away."""

    topic: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{0,249}$")] = ""
    """The sites meet at this topic, which is created with one partition and compaction where it does not exist; empty
    means that there is no fleet. It must not be one of `source.kafka.topics`."""
    site: Annotated[str, Field(pattern=r"^([A-Za-z0-9_][A-Za-z0-9._-]{0,63})?$")] = ""
    """The others know this agent by this name, which no two of them may share: up to 64 letters, digits, `_`, `.` and
    `-`."""
    min_images: int = Field(5, ge=1)
    """What leaves this site grows by at least this number of images of a class, or by none of it: one image of a class
    would give its feature away, as would two, and of three or four not much is hidden. 5 is the smallest cell that many
    statistical offices publish. Images that are held back for it count here at once, and elsewhere with those that
    follow. 1 holds back none."""
    pause_s: float = Field(60, gt=0)
    """When other sites have learned and no task of this site comes, a release is made with what they learned after this
    number of seconds; what comes meanwhile goes into the same release."""
    max_bytes: int = Field(8 * 2**30, ge=2**20)
    """What other sites have published takes at most this number of bytes in the folder `fleet` of the state folder (at
    least 1 MiB); what would come beyond is refused. One site's takes at most half of it."""

    @model_validator(mode="after")
    def _named(self) -> Fleet:
        if self.topic and not self.site:
            raise ValueError("site is empty; expected the name of this site, which no other site has")
        return self
