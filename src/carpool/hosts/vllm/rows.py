"""Who the rows of a forward pass are: filled from the engine's batch just before it, read by every router.

The buffers live as long as the engine, so a recorded CUDA graph reads the rows of the step it is replayed in.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from carpool.batch import Batch

OPT_OUT = "carpool"  # key in `SamplingParams.extra_args`


class Rows:
    """Request and phase of each row.

    Attributes:
        size: rows the buffers hold.
        expected: rows of the running forward pass, padding included; 0 outside of one.
        sharing: rows of the running forward pass that a policy may change.
    """

    def __init__(self, size: int, max_requests: int, by_request: bool, device: torch.device) -> None:
        self.size, self.max_requests, self.by_request = size, max_requests, by_request
        self.expected = self.sharing = 0
        self._request_N = torch.zeros(size, dtype=torch.int64, device=device)
        self._zero_N = torch.zeros(size, dtype=torch.int64, device=device)
        self._real_N = torch.zeros(size, dtype=torch.bool, device=device)
        self._voter_N = torch.zeros(size, dtype=torch.bool, device=device)
        self._exempt_N = torch.ones(size, dtype=torch.bool, device=device)

    def fill(self, runner: Any, num_rows: int) -> None:
        """Describe the batch that `runner` (a V1 model runner) is about to run in `num_rows` rows.

        A request decodes if its prompt is computed and it runs one row and its draft tokens; more rows are a
        recomputation after a preemption. Prompt rows, recomputed rows and requests that opted out are exempt.
        """
        batch = runner.input_batch
        n = batch.num_reqs
        starts = runner.query_start_loc.np[: n + 1]
        lengths = np.diff(starts)
        drafts = np.fromiter((len(ids) for ids in batch.spec_token_ids[:n]), np.int64, n)
        prefill = (batch.num_computed_tokens_cpu[:n] < batch.num_prompt_tokens[:n]) | (lengths > drafts + 1)
        out = np.fromiter((opted_out(runner.requests[name].sampling_params) for name in batch.req_ids[:n]), bool, n)
        shares = np.repeat(~prefill & ~out, lengths)
        count = len(shares)
        self.expected, self.sharing = num_rows, int(shares.sum())
        shares_N = torch.from_numpy(shares)
        self._request_N.zero_()
        self._request_N[:count].copy_(torch.from_numpy(np.repeat(np.arange(n), lengths)))
        self._real_N.zero_()
        self._voter_N.zero_()
        self._exempt_N.fill_(True)
        self._real_N[:count] = True
        self._voter_N[:count].copy_(shares_N)
        self._exempt_N[:count].copy_(~shares_N)

    def clear(self) -> None:
        """No request is running: whatever is forwarded now (profiling, warm-up, graph capture) is padding."""
        self.expected = self.sharing = 0
        self._real_N.zero_()
        self._voter_N.zero_()
        self._exempt_N.fill_(True)

    def batch(self, num_rows: int) -> Batch:
        """The first `num_rows` rows."""
        zero_N, request_N = self._zero_N[:num_rows], self._request_N[:num_rows]
        num_requests = min(self.max_requests, num_rows)  # a request has a row at least
        return Batch(
            group_N=request_N if self.by_request else zero_N,
            num_groups=num_requests if self.by_request else 1,
            real_N=self._real_N[:num_rows],
            voter_N=self._voter_N[:num_rows],
            exempt_N=self._exempt_N[:num_rows],
            step_N=zero_N,
            request_N=request_N,
            num_requests=num_requests,
        )


def opted_out(sampling_params: Any) -> bool:
    """Whether a request asked for native routing with `extra_args={"carpool": "off"}`.

    Any other value but "on" counts as off too: what we do not understand must not change a user's result.
    """
    extra = getattr(sampling_params, "extra_args", None) or {}
    return extra.get(OPT_OUT, "on") != "on"
