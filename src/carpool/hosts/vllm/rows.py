"""Who the rows of a forward pass are: filled from the engine's batch just before it, read by every router.

The buffers live as long as the engine, so a recorded CUDA graph reads the rows of the step it is replayed in.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from carpool.batch import Batch

OPT_OUT = "carpool"  # keys in `SamplingParams.extra_args`
TENANT = "carpool_tenant"


class Rows:
    """Request and phase of each row.

    Attributes:
        size: rows the buffers hold.
        expected: rows of the running forward pass, padding included; 0 outside of one.
        sharing: rows of the running forward pass that a policy may change.
    """

    def __init__(self, size: int, max_requests: int, group: str, device: torch.device) -> None:
        self.size, self.max_requests, self.group = size, max_requests, group
        self.expected = self.sharing = 0
        self._request_N = torch.zeros(size, dtype=torch.int64, device=device)
        self._tenant_N = torch.zeros(size, dtype=torch.int64, device=device)
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
        if self.group == "tenant":
            self._tenant_N.zero_()
            self._tenant_N[:count].copy_(torch.from_numpy(np.repeat(self._tenants(runner), lengths)))
        self._real_N.zero_()
        self._voter_N.zero_()
        self._exempt_N.fill_(True)
        self._real_N[:count] = True
        self._voter_N[:count].copy_(shares_N)
        self._exempt_N[:count].copy_(~shares_N)

    @staticmethod
    def _tenants(runner: Any) -> np.ndarray[Any, Any]:
        """Each request's group, the number of its tenant's first request; without a tenant it is alone."""
        names = runner.input_batch.req_ids[: runner.input_batch.num_reqs]
        first: dict[Any, int] = {}
        tenants = (tenant_of(runner.requests[name].sampling_params) for name in names)
        numbers = (i if tenant is None else first.setdefault(tenant, i) for i, tenant in enumerate(tenants))
        return np.fromiter(numbers, np.int64, len(names))

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
            group_N={"batch": zero_N, "request": request_N, "tenant": self._tenant_N[:num_rows]}[self.group],
            num_groups=1 if self.group == "batch" else num_requests,
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


def tenant_of(sampling_params: Any) -> tuple[type, str | int] | None:
    """Whose request it is, by `extra_args={"carpool_tenant": "name"}`; None without a text or whole number there.

    What cannot be a key makes the request a group of its own: nobody shares with a stranger by mistake.
    """
    tenant = (getattr(sampling_params, "extra_args", None) or {}).get(TENANT)
    if isinstance(tenant, bool) or not isinstance(tenant, str | int) or tenant == "":
        return None
    return type(tenant), tenant
