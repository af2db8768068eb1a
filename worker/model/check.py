"""Checks of a model's own weights before it serves: equality with the plain model, and the limits of exactness.

It computes on random tokens in slots of its own, which it gives back.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise, takewhile
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from worker.model import memory
from worker.model.attention import NAME, Recorder, passing
from worker.model.calls import CallListener
from worker.model.linear import packed_linears
from worker.model.model import SHARED_UNIT, Model
from worker.model.slots import Together
from worker.model.steady import Seen, Watch, rounds_by_place
from worker.model.transfer import send

if TYPE_CHECKING:
    from worker.model.cpu.forward import Forwards

NUM_TOKENS = 24
CHUNKS = (0, 11, 18)                                                # two chunks, then decode rows
MAX_RELATIVE_ERROR = {torch.float32: 1e-3, torch.bfloat16: 0.15}    # rounding alone stays ten times below
MAX_QUANTIZED_ERROR = 0.25
MIN_ROWS, MAX_ROWS = 2, 32                                         # of a decode forward where torch multiplies
UNIFORM_ROWS = 1, 2, 5, 16                                          # rows per forward, NUM_TOKENS in all
MAX_SHARED_WEIGHTS = 1 << 27    # larger products gain too little for the seconds that the check takes
FEW_ROWS = (16, 64, 128)        # of a forward on a GPU with fewer rows than the most
DEVICE_ROWS = (16, 128, 256)    # choices of the most: so few cost little more than one row, reading the weights


def random_token_ids(vocab_size: int, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(vocab_size, (count,), generator=generator).tolist()


def plain_logits(module: Any, token_ids: list[int]) -> Tensor:
    """Logits of the model as transformers computes it, in one forward, with its own attention."""
    module.set_attn_implementation("eager")
    with torch.inference_mode():
        logits: Tensor = module(input_ids=torch.tensor([token_ids], device=module.device), use_cache=False).logits[0]
    module.set_attn_implementation(NAME)
    return logits


def record(module: Any) -> Recorder:
    """The shape of every layer's keys, recorded in a forward without attention."""
    recorder = Recorder()
    with torch.inference_mode(), passing(recorder):
        device = module.device
        module(input_ids=torch.tensor([[0, 0]], device=device), position_ids=torch.tensor([[0, 1]], device=device),
               use_cache=False, context=recorder)
    return recorder


def relative_error(model: Model, expected: Tensor) -> float:
    """Prefill in two chunks and decode rows, two at a time, against logits of one plain forward.

    The worst part counts, by its median row: in bfloat16 rounding alone may route a row to other experts.
    """
    token_ids = random_token_ids(model.vocab_size, NUM_TOKENS)
    trial = memory.scratch(model.kv_shapes, 1, NUM_TOKENS, model.dtype, model.device)
    parts = []
    for begin, end in pairwise(CHUNKS):
        chunk = trial.chunk(0, begin, end)
        parts.append(model.forward(token_ids[begin:end], range(begin, end), chunk, range(end - begin)))
    decoded = []
    for begin in range(CHUNKS[-1], NUM_TOKENS, 2):
        rows = trial.rows((0, 0), (begin, begin + 1))
        decoded.append(model.decode(token_ids[begin:begin + 2], rows, (begin, begin + 1), (0, 1)))
    parts.append(torch.cat(decoded))
    split = expected[:, :model.vocab_size].float().split([len(part) for part in parts])
    return max(_relative(part.float(), plain) for part, plain in zip(parts, split, strict=True))


def _relative(got: Tensor, expected: Tensor) -> float:
    centred = expected - expected.mean(dim=-1, keepdim=True)
    error = (got - expected).norm(dim=-1) / centred.norm(dim=-1).clamp_min(1e-6)
    return float(error.median()) if bool(error.isfinite().all()) else float("inf")


def probe_row_limit(model: Model, num_seqs: int) -> tuple[int, int]:
    """The least and the most rows of a decode forward whose logits do not depend on the number of rows.

    Small and large products sum in another order than those between. In bfloat16 this shows in so few places that a
    probe may miss it: one row, a matrix-vector product, is the known case and never used. On a GPU all forwards have
    enough rows for `num_seqs`, the most, or one of the few sizes with equal bits (`probe_row_sizes`)."""
    if memory.is_paged(model.device):
        num_rows = next((num for num in DEVICE_ROWS if num >= num_seqs), DEVICE_ROWS[-1])
        return num_rows, num_rows
    num_usual = 8
    token_ids = random_token_ids(model.vocab_size, MAX_ROWS)
    trial = memory.scratch(model.kv_shapes, MAX_ROWS, 1, model.dtype, model.device)

    def logits(begin: int, end: int) -> Tensor:
        context = trial.rows(range(begin, end), (0,) * (end - begin))
        return model.forward(token_ids[begin:end], (0,) * (end - begin), context, range(end - begin))

    def is_usual(num_rows: int) -> bool:
        """Whether eight rows have the usual bits when computed so many at a time."""
        begins = range(0, num_usual - num_rows + 1, num_rows) or [0]
        return all(torch.equal(logits(begin, begin + num_rows)[:num_usual], usual[begin:begin + num_rows])
                   for begin in begins)

    usual = logits(0, num_usual)
    fewer = list(takewhile(is_usual, range(num_usual - 1, MIN_ROWS - 1, -1)))
    more = list(takewhile(is_usual, (12, 16, 24, MAX_ROWS - 1, MAX_ROWS)))
    return min(fewer, default=num_usual), max(more, default=num_usual)


def probe_row_sizes(model: Model) -> tuple[int, ...]:
    """Numbers of rows of a forward on a GPU, up to the most, that give every row the same bits as the most does.

    Our own products do (products.py). cuBLAS has a kernel of its own for nearly every number of rows, which may round
    differently in so few places that a check misses it: where it multiplies, as in routing to experts, one number is
    used.
    """
    most = model.max_rows
    token_ids = send(random_token_ids(model.vocab_size, most), model.device)
    trial = memory.scratch(model.kv_shapes, most, 1, model.dtype, model.device)

    def logits(num_rows: int) -> Tensor:
        first, rows = send([0] * num_rows, model.device), send(range(num_rows), model.device)
        return torch.cat([model.forward_tensors(token_ids[None, begin:begin + num_rows], first[None], trial.rows(
            range(begin, begin + num_rows), (0,) * num_rows), rows) for begin in range(0, most, num_rows)])

    with _Products() as products:
        usual = logits(most)
    if products.were_there:
        return (most,)
    return *(size for size in FEW_ROWS if size < most and torch.equal(logits(size), usual)), most


class _Products(CallListener):
    """Records whether torch has multiplied and summed; with rotary angles it only multiplies."""

    MULTIPLIED: ClassVar = {"mm": 0, "bmm": 0, "matmul": 0, "linear": 0, "addmm": 1, "baddbmm": 1}  # which argument is

    def __init__(self) -> None:
        super().__init__()
        self.were_there = False

    def hear(self, name: str, args: Sequence[Any]) -> None:
        place = self.MULTIPLIED.get(name)
        self.were_there |= place is not None and args[place].shape[-1] > 1


def says_the_same(model: Model, program: Forwards) -> bool:
    """Whether a program and the model agree, on a chunk, and on a chunk beside decode rows."""
    token_ids, begin = random_token_ids(model.vocab_size, NUM_TOKENS), CHUNKS[1]

    def played() -> Tensor:
        trial = memory.scratch(model.kv_shapes, 3, NUM_TOKENS, model.dtype, model.device)
        first = model.forward(token_ids[:begin], range(begin), trial.chunk(1, 0, begin), range(begin))
        decoded, num_prefilled = range(begin, CHUNKS[2]), NUM_TOKENS - CHUNKS[2]
        parts = [(trial.rows([1] * len(decoded), decoded), len(decoded)),
                 (trial.chunk(2, 0, num_prefilled), num_prefilled)]
        second = model.forward(token_ids[begin:], [*decoded, *range(num_prefilled)], Together(parts),
                               range(0, NUM_TOKENS - begin, 2))
        return torch.cat([first, second])

    expected = played()
    before, model.program = model.program, program
    got = played()
    model.program = before
    return torch.equal(got, expected)


def is_uniform(model: Model) -> bool:
    """Whether a token's logits have the same bits in every forward: in a row alone, among others, and in a chunk.

    This holds if our kernels compute all products, in one order for any number of rows. It is checked nevertheless.
    """
    if memory.is_paged(model.device) or _has_plain_products(model) or _rounds_by_place(model) or not all(
            layer.is_uniform for layer in packed_linears(model.module)):
        return False
    token_ids = random_token_ids(model.vocab_size, NUM_TOKENS)
    trial = memory.scratch(model.kv_shapes, 2, NUM_TOKENS, model.dtype, model.device)
    in_chunks = [model.forward(token_ids[begin:end], range(begin, end), trial.chunk(0, begin, end), range(end - begin))
                 for begin, end in pairwise((0, CHUNKS[1], NUM_TOKENS))]
    in_rows = []
    for begin, end in pairwise(accumulate(UNIFORM_ROWS, initial=0)):
        positions = range(begin, end)
        in_rows.append(model.forward(token_ids[begin:end], positions, trial.rows([1] * len(positions), positions),
                                     range(len(positions))))
    return torch.equal(torch.cat(in_chunks), torch.cat(in_rows))


def _has_plain_products(model: Model) -> bool:
    """Whether torch computes products: whether a weight, other than of embeddings, is not packed."""
    return any(weight.dim() > 1 for module in model.module.modules() if not isinstance(module, nn.Embedding)
               for weight in module.parameters(recurse=False))


def _rounds_by_place(model: Model) -> bool:
    """Whether a row's bits depend on its place in a forward, by a function of torch that a trial may not show."""
    token_ids = random_token_ids(model.vocab_size, NUM_TOKENS)

    def seen(num_rows: int) -> list[Seen]:
        trial = memory.scratch(model.kv_shapes, 1, NUM_TOKENS, model.dtype, model.device)
        watch = Watch()
        with watch:
            model.forward(token_ids[:num_rows], range(num_rows), trial.chunk(0, 0, num_rows), range(num_rows))
        return watch.seen

    return rounds_by_place(seen(NUM_TOKENS - 1), seen(NUM_TOKENS), NUM_TOKENS, model.most_rows)


def probe_shared_rows(model: Model) -> int:
    """The most rows of a forward shared by several parts, where each part has the bits that it has alone; 0: none.

    Every number of rows that such a forward may have is tried, with every row in it. Packed products sum in one order
    for hundreds of rows on some processors only; plain ones are not tried.
    """
    num_weights = sum(layer.packed.numel() for layer in packed_linears(model.module))
    if model.has_fixed_rows or num_weights > MAX_SHARED_WEIGHTS or (
            _has_plain_products(model) or _rounds_by_place(model)):
        return 0
    num_parts = model.most_rows // SHARED_UNIT
    token_ids = random_token_ids(model.vocab_size, model.most_rows)
    trial = memory.scratch(model.kv_shapes, num_parts, SHARED_UNIT, model.dtype, model.device)

    def logits(begin: int, end: int) -> Tensor:
        parts = [(trial.chunk(part, 0, SHARED_UNIT), SHARED_UNIT) for part in range(begin, end)]
        rows = range((end - begin) * SHARED_UNIT)
        return model.together(token_ids[begin * SHARED_UNIT:end * SHARED_UNIT], parts,
                              [row % SHARED_UNIT for row in rows], rows)

    apart = torch.cat([logits(part, part + 1) for part in range(num_parts)])
    same = takewhile(lambda num: torch.equal(logits(0, num), apart[:num * SHARED_UNIT]), range(2, num_parts + 1))
    return SHARED_UNIT * max(same, default=0)
