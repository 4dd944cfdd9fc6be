"""Everybody who calls a model of transformers under a policy: what is known of the rows, and what happens to them.

The tests run every entry, and docs/rows.md is made from them. Forwards are written a word a sequence and a letter a
row: `p` a prompt's, which keeps its native routing; `v` a row that shares and votes; `e` one that has ended, hence
has no vote; `.` padding.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

PLAN = "xshare(budget=2, warmup=0)"


@dataclass
class World:
    """What a caller has at hand.

    Attributes:
        model: what is shared.
        run: the block that is open.
        first_B: the tokens that the stock model gives after the prompts of `ids(3, 5)`.
    """

    model: Any
    run: Any
    first_B: list[int]

    def generate(self, *args: Any, **settings: Any) -> Any:
        plain = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        return self.model.generate(*args, **(plain | settings))


@dataclass(frozen=True)
class Caller:
    """One way to call.

    Attributes:
        name: what the caller does.
        known: where it is known whose the rows are.
        happens: in words.
        act: does it.
        rows: the forwards, in order.
        groups: of the last forward, the rows' groups in order, where that is the point.
        timed: which rows come together depends on threads; together they are as said.
        refused: instead, what the refusal says.
        make: of the plain model, what is shared.
        mode: in which the block is entered, and left again before anything runs.
        options: of `share`.
    """

    name: str
    known: str
    happens: str
    act: Callable[[World], object]
    rows: tuple[str, ...] = ()
    groups: tuple[int, ...] = ()
    timed: bool = False
    refused: str = ""
    make: Callable[[Any], Any] = lambda model: model
    mode: Callable[[], AbstractContextManager[Any]] = nullcontext
    options: dict[str, Any] = field(default_factory=dict)


def ids(rows: int, length: int) -> Tensor:
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(1))


def padding_is_said(model: Any) -> Any:
    """The second of the prompts `ids(3, 5)` goes on with the model's pad token."""
    with torch.no_grad():
        model.generation_config.pad_token_id = int(model(ids(3, 5)).logits[1, -1].argmax())
    return model


def padded() -> Tensor:
    """The mask of three prompts, the first with padding on its left."""
    return torch.tensor([[0, 0, 1, 1, 1], [1] * 5, [1] * 5])


class Certain:
    """Makes generation sure of one token in some rows, and never say it in others."""

    def __init__(self, rows: slice, token: int) -> None:
        self.rows, self.token = rows, token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        sure = scores.clone()
        sure[:, self.token] = -1e9
        sure[self.rows] = -1e9
        sure[self.rows, self.token] = 0
        return sure


def prompts_end_at(world: World, **settings: Any) -> None:
    """The first of two prompts is through after one token, the other goes on."""
    from transformers import LogitsProcessorList

    world.generate(
        ids(2, 4), eos_token_id=9, logits_processor=LogitsProcessorList([Certain(slice(0, 2), 9)]), **settings
    )


def asked_in_between(world: World) -> None:
    """The model is asked about something else in the middle of a generation."""

    def between(tokens: Tensor, _: Any) -> Tensor:
        with torch.no_grad():
            world.model(input_ids=ids(3, 2))
        return torch.tensor([True, False])

    world.generate(ids(2, 4), stopping_criteria=[between])


@torch.no_grad()
def decode(world: World, steps: list[list[int]], cache: Any = None, known: Any = None, **given: Any) -> None:
    """A loop of one's own: the prompts, then given tokens."""
    output = world.model(input_ids=ids(3, 5), past_key_values=cache, use_cache=True, **given)
    for step in steps:
        world.run.known = known
        world.model(input_ids=torch.tensor(step).unsqueeze(1), past_key_values=output.past_key_values, **given)
    world.run.known = None


@torch.no_grad()
def static_loop(world: World) -> None:
    """With a cache and a mask of full length, as CUDA graphs need them."""
    from transformers import StaticCache

    cache, mask = StaticCache(world.model.config, max_cache_len=32), torch.zeros(3, 32, dtype=torch.int64)
    mask[:, :5] = padded()
    world.model(input_ids=ids(3, 5), attention_mask=mask, past_key_values=cache)
    for place in (5, 6):
        mask[:, place] = 1
        world.model(input_ids=ids(3, 1), attention_mask=mask, past_key_values=cache)


@torch.no_grad()
def chunks(world: World, sizes: list[int], known: Any) -> None:
    """A prompt in chunks of one's own."""
    from transformers import DynamicCache

    cache = DynamicCache(config=world.model.config)
    world.run.known = known
    for chunk in ids(2, sum(sizes)).split(sizes, 1):
        world.model(input_ids=chunk, past_key_values=cache, use_cache=True)
    world.run.known = None
    world.model(input_ids=ids(2, 1), past_key_values=cache, use_cache=True)


def causal(sees_itself: bool, additive: bool) -> Tensor:
    """Attention masks `[B, 1, S, S]` of the padded prompts; padding may look at itself, lest its softmax be empty."""
    seen = torch.ones(5, 5, dtype=torch.bool).tril() & padded().bool().unsqueeze(1)
    if sees_itself:
        seen = seen | torch.eye(5, dtype=torch.bool)
    seen = seen.unsqueeze(1)
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min) if additive else seen


@torch.no_grad()
def own_mask(world: World, mask: Tensor) -> None:
    world.model(input_ids=ids(3, 5), attention_mask=mask)


def known(**what: Any) -> Any:
    from carpool.hosts.transformers import Known

    return Known(**what)


def drafting(model: Any) -> Any:
    """Two drafts at a time, whatever the model thinks of them."""
    model.generation_config.num_assistant_tokens = 2
    model.generation_config.num_assistant_tokens_schedule = "constant"
    model.generation_config.assistant_confidence_threshold = 0.0
    return model


def another(seed: int = 3) -> Any:
    """A model that agrees with the shared one on nothing, or (seed 0) on everything."""
    from tiny_models import tiny_model

    return drafting(tiny_model("qwen3_moe", seed=seed))


def lora(**where: Any) -> Callable[[Any], Any]:
    def wrap(model: Any) -> Any:
        from peft import LoraConfig, get_peft_model

        return get_peft_model(model, LoraConfig(**where))

    return wrap


def own_generate(world: World, *fed: int) -> None:
    """A decoding loop handed to `generate`."""

    def loop(model: Any, input_ids: Tensor, **_: Any) -> Tensor:
        decode(world, [list(fed)])
        return input_ids

    world.generate(ids(3, 5), custom_generate=loop)


def continuous(world: World, prompts: list[list[int]], budget: int, **settings: Any) -> None:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    world.model.set_attn_implementation("sdpa")
    made = world.model.generate_batch(
        prompts,
        generation_config=GenerationConfig(
            max_new_tokens=3, eos_token_id=-1, pad_token_id=0, **({"do_sample": False} | settings)
        ),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=16, page_size=16, max_batch_tokens=budget),
    )
    assert all(one.error is None for one in made.values())


def offloaded(how: str) -> Callable[[Any], Any]:
    def make(model: Any) -> Any:
        import accelerate

        cpu = torch.device("cpu")
        if how == "cpu":
            return accelerate.cpu_offload(model, execution_device=cpu, offload_buffers=True)
        folder = tempfile.mkdtemp()
        if how == "disk":
            return accelerate.disk_offload(model, folder, execution_device=cpu)
        places = {name: "cpu" for name, _ in model.named_children()} | {"model": "disk"}
        return accelerate.dispatch_model(model, places, main_device=cpu, offload_dir=folder)

    return make


def again(world: World) -> None:
    """A second turn on the cache of the first."""
    output = world.generate(ids(2, 5), return_dict_in_generate=True)
    longer = torch.cat([output.sequences, ids(2, 2)], 1)
    world.generate(longer, past_key_values=output.past_key_values, max_new_tokens=2)


def trained(world: World) -> None:
    world.model.train()
    world.model.gradient_checkpointing_enable()
    world.model(ids(2, 4), labels=ids(2, 4)).loss.backward()
    world.model.eval()


def checkpointed(world: World) -> None:
    from torch.utils.checkpoint import checkpoint

    checkpoint(lambda tokens: world.model(tokens).logits, ids(2, 4), use_reentrant=False)


@torch.no_grad()
def elsewhere_by_default(world: World) -> None:
    tokens = ids(2, 4)
    with torch.device("meta"):
        output = world.model(input_ids=tokens, use_cache=True)
        world.model(input_ids=tokens[:, :1], past_key_values=output.past_key_values)


def spread(model: Any) -> Any:
    from transformers.distributed import DistributedConfig

    model.config.distributed_config = DistributedConfig(tp_size=2, ep_size=2)
    model.ep_plan = {"model.layers.*.mlp.gate": "ep_router", "model.layers.*.mlp.experts": "moe_tp_experts"}
    return model


GENERATE = "`generate`'s loop"
CALLERS = (
    Caller(
        "`generate`, prompts padded on the left", GENERATE + ", the padding mask",
        "prompts native, padding nobody, then every sequence votes",
        lambda world: world.generate(ids(3, 5), attention_mask=padded()), ("..ppp ppppp ppppp", "v v v", "v v v"),
    ),
    Caller(
        "`generate`, a sequence ends; the pad token is given in the call", GENERATE,
        "what has ended has no vote, whatever it is fed",
        lambda world: world.generate(ids(3, 5), eos_token_id=world.first_B[0], pad_token_id=7),
        ("ppppp ppppp ppppp", "e v v", "e v v"),
    ),
    Caller(
        "`generate`, a live sequence says the pad token", GENERATE, "it votes: nothing is read from tokens",
        lambda world: world.generate(ids(3, 5), eos_token_id=63, pad_token_id=world.first_B[1]),
        ("ppppp ppppp ppppp", "v v v", "v v v"), make=padding_is_said,
    ),
    Caller(
        "`generate` with a stopping criterion of one's own", GENERATE, "what it stops has no vote",
        lambda world: world.generate(ids(3, 5), stopping_criteria=[lambda tokens, _: torch.tensor([0, 1, 0]).bool()]),
        ("ppppp ppppp ppppp", "v e v", "v e v"),
    ),
    Caller(
        "`generate(prefill_chunk_size=4)`, prompts of 9", GENERATE, "all chunks are prompts', the last row too",
        lambda world: world.generate(ids(2, 9), prefill_chunk_size=4), ("pppp pppp", "pppp pppp", "p p", "v v", "v v"),
    ),
    Caller(
        "`generate`, prompts of one token", GENERATE, "they are prompts", lambda world: world.generate(ids(2, 1)),
        ("p p", "v v", "v v"),
    ),
    Caller(
        "`generate` from embeddings", GENERATE, "as from tokens",
        lambda world: world.generate(inputs_embeds=world.model.get_input_embeddings()(ids(2, 4))),
        ("pppp pppp", "v v", "v v"),
    ),
    Caller(
        "`generate` with a static cache (masks `[B, 1, S, L]`)", GENERATE + ", who looks at something",
        "as with any cache",
        lambda world: world.generate(ids(3, 5), attention_mask=padded(), cache_implementation="static"),
        ("..ppp ppppp ppppp", "v v v", "v v v"),
    ),
    Caller(
        "`generate` goes on from an earlier cache", GENERATE, "what the cache lacks is the prompt", again,
        ("ppppp ppppp", "v v", "v v", "ppp ppp", "v v"),
    ),
    Caller(
        "`generate(num_return_sequences=2)`, grouped by prompt", GENERATE, "the samples of one prompt share",
        lambda world: world.generate(ids(2, 4), num_return_sequences=2, do_sample=True),
        ("pppp pppp pppp pppp", "v v v v", "v v v v"), groups=(0, 0, 1, 1), options={"group": "prompt"},
    ),
    Caller(
        "`generate(num_beams=2)`, grouped by prompt", GENERATE, "the beams of one prompt share",
        lambda world: world.generate(ids(2, 4), num_beams=2), ("pppp pppp pppp pppp", "v v v v", "v v v v"),
        groups=(0, 0, 1, 1), options={"group": "prompt"},
    ),
    Caller(
        "`generate(num_beams=2, early_stopping=True)`, one prompt is through", GENERATE,
        "its beams have no vote; the others' go on",
        lambda world: prompts_end_at(world, num_beams=2, early_stopping=True),
        ("pppp pppp pppp pppp", "e e v v", "e e v v"),
    ),
    Caller(
        "`generate(assistant_model=...)`", GENERATE,
        "candidates are decoded rows: a request's share, the prompt's stay native",
        lambda world: world.generate(ids(1, 5), assistant_model=another()), ("pppppvv", "vv", "v"),
    ),
    Caller(
        "the assistant of another model's `generate`", GENERATE, "its drafts share; what was accepted is no prompt",
        lambda world: another(0).generate(
            ids(1, 5), assistant_model=drafting(world.model), max_new_tokens=5, do_sample=False, eos_token_id=None
        ),
        ("ppppp", "v", "vv"), options={"plan": "xshare(budget=8)"},
    ),
    Caller(
        "`generate(prompt_lookup_num_tokens=3)`", GENERATE, "as with an assistant",
        lambda world: world.generate(ids(1, 4).repeat(1, 2), prompt_lookup_num_tokens=3, max_new_tokens=2),
        ("ppppppppvvv", "v"),
    ),
    Caller(
        "`generate(assistant_early_exit=1)`, the model drafts for itself", GENERATE,
        "drafts read the first layers alone and share, too",
        lambda world: drafting(world.model) and world.generate(ids(1, 5), assistant_early_exit=1),
        ("ppppp", "v", "pppppvv", "v"),
    ),
    Caller(
        "`generate(guidance_scale=...)`, each step twice", GENERATE,
        "the second forward's rows are the first one's; its one-token prompt is a prompt",
        lambda world: world.generate(ids(2, 4), guidance_scale=1.5), ("pppp pppp", "p p", "v v", "v v", "v v", "v v"),
    ),
    Caller(
        "a forward that something calls in the middle of `generate`", "its cache, its mask",
        "its rows are its own, and the loop's go on", asked_in_between,
        ("pppp pppp", "pp pp pp", "e v", "pp pp pp", "e v", "pp pp pp"),
    ),
    Caller(
        "`generate(use_cache=False)`", GENERATE, "refused: its forwards are no decoding steps",
        lambda world: world.generate(ids(2, 4), use_cache=False), refused=r"generate\(use_cache=False\) computes every",
    ),
    Caller(
        "`generate(custom_generate=...)`", "as in a loop of one's own", "as in a loop of one's own",
        lambda world: own_generate(world, 5, 6, 7), ("ppppp ppppp ppppp", "v v v"),
    ),
    Caller(
        "the same, a sequence is fed the pad token", "not whether it has ended", "refused, as in a loop of one's own",
        lambda world: own_generate(world, 5, 0, 7), refused="sequence 1 is fed token 0",
    ),
    Caller(
        "continuous batching (`generate_batch`), chunks of a prompt, a prompt of one token", "its manager",
        "as `generate`; the manager's thread belongs to the block that made it",
        lambda world: continuous(world, [ids(1, 5)[0].tolist(), [9]], budget=4),
        ("pppp", "p p", "v v", "v v"), timed=True,
    ),
    Caller(
        "`generate_batch(num_return_sequences=2)`, grouped by prompt", "its manager",
        "the samples of one request share",
        lambda world: continuous(world, [[5, 6, 7], [8, 9, 4]], budget=32, num_return_sequences=2, do_sample=True),
        ("pp pp", "p p p p", "v v v v", "v v v v"), timed=True, options={"group": "prompt"},
    ),
    Caller(
        "a loop of one's own", "its cache, its mask",
        "several tokens of a sequence, or its first, are a prompt; one token more is decoding, and votes",
        lambda world: decode(world, [[5, 6, 7], [8, 9, 10]]), ("ppppp ppppp ppppp", "v v v", "v v v"),
    ),
    Caller(
        "a loop of one's own, prompts of one token, the pad token among them", "its cache is empty",
        "they are prompts", lambda world: world.model(input_ids=torch.tensor([[0], [5]])), ("p p",),
    ),
    Caller(
        "a loop of one's own, a sequence is fed the pad token", "not whether it has ended",
        "refused where votes matter (group-wide policies over a batch): the loop has to say it",
        lambda world: decode(world, [[5, 0, 7]]), refused=r"sequence 1 is fed token 0, .*run\.known = Known\(finished",
    ),
    Caller(
        "the same, under a policy that looks at single rows", "not whether it has ended", "votes do not matter",
        lambda world: decode(world, [[5, 0, 7]]), ("ppppp ppppp ppppp", "v v v"), options={"plan": "topk(k=1)"},
    ),
    Caller(
        "the same, saying `run.known = Known(finished=...)`", "the loop says it", "what has ended has no vote",
        lambda world: decode(world, [[5, 0, 7]], known=known(finished=torch.tensor([False, True, False]))),
        ("ppppp ppppp ppppp", "v e v"),
    ),
    Caller(
        "the same, saying `Known(finished=False)`", "the loop says it", "everybody votes",
        lambda world: decode(world, [[5, 0, 7]], known=known(finished=False)), ("ppppp ppppp ppppp", "v v v"),
    ),
    Caller(
        "a loop of one's own with a static cache and a mask of full length", "its cache says where it is",
        "as with any cache", static_loop, ("..ppp ppppp ppppp", "v v v", "v v v"),
    ),
    Caller(
        "a prompt in chunks of one's own, saying `Known(prefill=True)`", "the loop says it",
        "all chunks are prompts', of one token too",
        lambda world: chunks(world, [4, 1], known(prefill=True)), ("pppp pppp", "p p", "v v"),
    ),
    Caller(
        "a forward with masks `[B, 1, S, L]`, boolean", "who looks at something", "what looks at nothing is padding",
        lambda world: own_mask(world, causal(False, False)), ("..ppp ppppp ppppp",),
    ),
    Caller(
        "the same, additive", "who looks at something", "what looks at nothing is padding",
        lambda world: own_mask(world, causal(False, True)), ("..ppp ppppp ppppp",),
    ),
    Caller(
        "the same, padding looks at itself", "nothing: it looks as the beginning of a sequence does", "refused",
        lambda world: own_mask(world, causal(True, True)), refused="several rows of one sequence that look at one",
    ),
    Caller(
        "a forward with a mask longer than its tokens, and no cache", "not which columns are its tokens'", "refused",
        lambda world: own_mask(world, torch.ones(3, 9)), refused="9 columns for 5 tokens and no cache",
    ),
    Caller(
        "a plain forward, grouped by prompt", "not whose samples its rows are", "refused",
        lambda world: world.model(ids(2, 4)), refused=r"group='prompt'.*Known\(prompt=", options={"group": "prompt"},
    ),
    Caller(
        "a loop of one's own, saying `Known(prompt=...)`", "the loop says it", "samples of one prompt share",
        lambda world: (
            setattr(world.run, "known", known(prompt=torch.tensor([4, 9, 4]))), world.model(ids(3, 5))
        ),
        ("ppppp ppppp ppppp",), groups=(0,) * 5 + (1,) * 5 + (0,) * 5, options={"group": "prompt"},
    ),
    Caller(
        "any, grouped by tenant", "not whose requests they are", "refused; set `run.batch`",
        lambda world: world.generate(ids(2, 4)), refused="does not say whose its rows are",
        options={"group": "tenant"},
    ),
    Caller(
        "a PEFT model", GENERATE + " in the model inside", "as the model inside",
        lambda world: world.generate(input_ids=ids(3, 5)), ("ppppp ppppp ppppp", "v v v", "v v v"),
        make=lora(target_modules=["q_proj"]),
    ),
    Caller(
        "a PEFT model with adapters on its experts", GENERATE + " in the model inside", "as the model inside",
        lambda world: world.generate(input_ids=ids(3, 5)), ("ppppp ppppp ppppp", "v v v", "v v v"),
        make=lora(target_parameters=["mlp.experts.gate_up_proj"]),
    ),
    Caller(
        "a PEFT model with an adapter on a router", "not how it routes", "refused",
        lambda world: None, refused=r"adapter on its router \(ParamWrapper\).*merge_and_unload",
        make=lora(target_parameters=["mlp.gate.weight"]),
    ),
    Caller(
        "training with `gradient_checkpointing_enable`", "the forward whose layers are computed again",
        "the same rows are routed in the same way, wherever the backward pass runs, and counted once",
        trained, ("vvvv vvvv",), options={"exempt_prefill": False},
    ),
    Caller(
        "a checkpoint of one's own around the model", "not whose rows are computed again", "refused", checkpointed,
        refused=r"checkpoint of your own.*gradient_checkpointing_enable",
    ),
    Caller(
        "weights offloaded to the CPU (accelerate)", "accelerate's hooks hold the weights", "as in memory",
        lambda world: world.generate(ids(2, 4)), ("pppp pppp", "v v", "v v"), make=offloaded("cpu"),
    ),
    Caller(
        "weights offloaded to disk", "accelerate's hooks hold the weights", "as in memory",
        lambda world: world.generate(ids(2, 4)), ("pppp pppp", "v v", "v v"), make=offloaded("disk"),
    ),
    Caller(
        "a `device_map` over CPU and disk", "accelerate's hooks hold the weights", "as in memory",
        lambda world: world.generate(ids(2, 4)), ("pppp pppp", "v v", "v v"), make=offloaded("map"),
    ),
    Caller(
        "a block entered under `torch.inference_mode()`, forwards with gradients", "as in a loop of one's own",
        "what the block made serves in any mode",
        lambda world: world.model(ids(2, 4), labels=ids(2, 4)).loss.backward(), ("vvvv vvvv",),
        mode=torch.inference_mode, options={"exempt_prefill": False},
    ),
    Caller(
        "another default device (`torch.set_default_device`)", "as in a loop of one's own",
        "everything is made where the layer computes", elsewhere_by_default, ("pppp pppp", "v v"),
        mode=lambda: torch.device("meta"),
    ),
    Caller(
        "expert parallelism by router masks (`ep_router`)", "not what the others' experts are asked for", "refused",
        lambda world: None, refused="spread over 2 processes", make=spread,
    ),
)  # fmt: skip
