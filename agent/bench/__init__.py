"""The comparison of methods on a stream: runs, their results, data, tables and charts."""

JOINT = "joint"
"""The upper bound is asked for by this name: `finetune` with all tasks as one. It needs the whole stream at once, so
that no agent can run it. The name stands here because the command must know it before torch is imported."""
