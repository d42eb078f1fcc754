"""How many replicas the queue calls for: tokens, not requests, because one request can be one row or ten thousand."""

from __future__ import annotations

import math
from typing import Any

from ray.serve.config import AutoscalingContext

PENDING_TOKENS = "pending_tokens"
"""What every replica reports through Serve's `record_autoscaling_stats`."""


class PendingTokensPolicy:
    """Serve's custom policy: as many replicas as bring the pending tokens of each down to the target.

    Serve applies its own delays to the answer. From zero replicas, where nothing is reported, one is started as soon
    as a request waits in a proxy.
    """

    def __init__(self, target_pending_tokens: int) -> None:
        self._target = target_pending_tokens

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        reported = (context.aggregated_metrics or {}).get(PENDING_TOKENS, {})
        pending = sum(reported.values())
        wanted = math.ceil(pending / self._target)
        if wanted == 0 and context.total_queued_requests:
            wanted = 1
        fewest, most = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
        return max(fewest, min(wanted, most)), {PENDING_TOKENS: pending}
