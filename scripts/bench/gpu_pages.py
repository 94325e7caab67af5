"""What paging the optimizer's states costs on a GPU, and what it gains.

There are three kinds of rows:

* Copies of pages between the host and the card, through the device that PagedAdamW uses. Their
  floor is one large copy of pinned memory each way, by PyTorch.
* A step of QLoRA whose states stream through the smallest budget, beside the same step with AdamW.
* That run under a limit of the memory pool that is enough for PagedAdamW and too small for AdamW.

A pool may need more than its arrays take, since larger arrays cannot use the free part of a block
that is partly used. So the limit is not computed. It is found between what the two runs need.
"""

import contextlib
import gc
import math
import statistics
from functools import partial

import gpu_step
from gpu_kernels import again
from gpu_table import Ceilings, Row, cells, line, measured_line, span, times

from minilm.backend import memory_limit, peak_memory
from minilm.optim import AdamW, PagedAdamW
from minilm.optim.pages import SLOTS
from minilm.optim.streams import CudaDevice

PCIE = Ceilings(55e9, math.inf)  # a direction of PCIe Gen5 x16, as programs reach it
SIZE = 1 << 30  # bytes of a large copy
PAGES = 1 << 22, 1 << 20  # parameters of a page: PagedAdamW's default, and a quarter of it
STEPS = 8
WAYS = {"in": "from the host to the card", "out": "from the card to the host"}


def lines(ceilings: Ceilings, rounds: int, take_turns):
    """Measure everything, line by line. take_turns: the function in benchmark.py."""
    link, found = measured_link(rounds)
    yield from found
    for row, ceiling in zip(copy_rows(), link):
        yield measured_line(row, ceiling, rounds)
    model = gpu_step.LLAMA, gpu_step.BATCH
    for page_size in PAGES:
        # The first answer is bytes; a second extra turn warms up.
        sides = take_turns((gpu_step.our_qlora, *model, False),
                           (gpu_step.our_qlora, *model, False, paged(page_size)), rounds + 2)
        yield from streaming_lines(page_size, ceilings, *([s[0], *s[2:]] for s in sides))

    def both(job, *args):
        sides = ((relieved, job, *model, kind, *args) for kind in (AdamW, paged(PAGES[-1])))
        return [answers[0] for answers in take_turns(*sides, 1)]

    (expected, most), (_, least) = both(needs)
    limit = (least + most) // 2
    yield limit_line(limit, expected, *both(within, limit))


def paged(page_size: int):
    """PagedAdamW with the smallest budget that pages of this size can have."""
    return partial(PagedAdamW, page_size=page_size, device_budget=SLOTS * 8 * page_size)


def measured_link(rounds: int, size=SIZE, device="cuda"):
    """([the speed of one large copy, each way], their lines in the table)."""
    import torch

    host = torch.zeros(size, dtype=torch.uint8, pin_memory=device == "cuda")
    card = torch.ones(size, dtype=torch.uint8, device=device)
    found, texts = [], []
    for title, (target, source) in zip(link_titles(size), ((card, host), (host, card))):
        copy = partial(target.copy_, source, non_blocking=True)
        rates = [size / t for t in times(again([copy]), rounds)]
        found.append(Ceilings(statistics.median(rates), math.inf))
        texts.append(cells(title, "", span([r / 1e9 for r in rates], "GB/s"), "", "", "", ""))
    return found, texts


def link_titles(size=SIZE):
    return [f"ceiling: one copy of {size:,} bytes of pinned memory {way}" for way in WAYS.values()]


def copy_rows(page_size=PAGES[0], size=SIZE) -> list[Row]:
    """A row each way. The pages have as many bytes together as a large copy."""
    nbytes = 8 * page_size
    count = size // nbytes

    def side(queue):
        def draw():
            device = CudaDevice()
            pages = [(device.frame(nbytes), device.home(nbytes, False)) for _ in range(count)]
            for frame, home in pages:
                frame.fill(0)
                home.fill(0)
            return again([partial(copy_pages, device, queue, pages)])
        return draw

    return [Row(f"{count} pages of {mib(page_size)} {way}", ((count * nbytes, 0),), side(queue),
                share=0.85) for queue, way in WAYS.items()]


def copy_pages(device: CudaDevice, queue: str, pages):
    """Copy pages, (frame, home) each, "in" or "out"; the caller's stream waits for them."""
    device.wait(queue, device.record("main"))
    for frame, home in pages:
        if queue == "in":
            device.copy_in(frame, home)
        else:
            device.copy_out(home, frame)
    device.wait("main", device.record(queue))


def streaming_lines(page_size: int, ceilings: Ceilings, theirs=(), ours=()) -> list[str]:
    """The rows of time and of memory, from both sides' answers if there are any."""
    row = gpu_step.step_row(gpu_step.LLAMA, gpu_step.BATCH, False)
    row = row._replace(title=f"{row.title}, states streaming in pages of {mib(page_size)}",
                       beside="states on the card", speed=1 / 1.05)
    memory = f"{row.title}: peak memory"
    if not ours:
        return [line(row, ceilings), cells(memory, "", "not yet measured", "",
                                           f"{row.beside}: not yet measured", "", "")]
    (their_peak, *their_times), (our_peak, *our_times) = theirs, ours
    return [line(row, ceilings, our_times, their_times),
            cells(memory, "", gib(our_peak), "", f"{row.beside}: {gib(their_peak)}",
                  f"{their_peak / our_peak:.3f}", "")]


def relieved(job, *args):
    """Yield what the job returns, once. If it finds no memory, the pool gives up its cached blocks.

    PagedAdamW sees to that by itself. AdamW would otherwise fail while the pool's cache is full.
    """
    device = CudaDevice()
    device.relieve_with(lambda nbytes: 0)
    answer = job(*args)
    gc.collect()  # ends a paged optimizer, which then removes its allocator
    device.close()
    yield answer


def needs(config, batch: int, optimizer):
    """(losses of a run without a limit, bytes of a pool that is large enough for the same run)."""
    step = small_step(config, batch, optimizer)
    with peak_memory() as peak:
        losses = [step() for _ in range(STEPS)]
    for limit in range(peak.bytes, 2 * peak.bytes, peak.bytes // 256):
        if len(losses_within(limit, lambda: step)) == STEPS:
            return losses, limit
    raise MemoryError(f"no run within twice its peak of {peak.bytes:,} bytes")


def within(config, batch: int, optimizer, limit: int) -> list[float]:
    """The losses of a run until it ends or finds no memory. Making the model is part of it."""
    return losses_within(limit, partial(small_step, config, batch, optimizer))


def losses_within(limit: int, ready) -> list[float]:
    gc.collect()
    losses = []
    with contextlib.suppress(MemoryError), memory_limit(limit):
        step = ready()
        for _ in range(STEPS):
            losses.append(step())
    return losses


def small_step(config, batch: int, optimizer):
    """A step that takes as little memory as possible: with a checkpoint a block."""
    model = gpu_step.our_model(config, gpu_step.RANK, "cuda")
    model.checkpoint_every = 1
    return gpu_step.our_step(model, batch, optimizer)


def limit_line(limit=0, expected=(), theirs=(), ours=()) -> str:
    """The row of both runs under the limit, from their losses."""
    row = gpu_step.step_row(gpu_step.LLAMA, gpu_step.BATCH, True)
    title = (f"{STEPS} times the {row.title}, in a pool too small for AdamW; states streaming in "
             f"pages of {mib(PAGES[-1])}")
    goal = "PagedAdamW finishes with AdamW's losses, AdamW runs out of memory"
    if not expected:
        return cells(title, "", "not yet measured", "", "AdamW: not yet measured", "", goal)
    met = ours == expected and len(theirs) < STEPS
    return cells(title, "", f"in {gib(limit)}: {outcome(ours, expected)}", "",
                 f"AdamW: {outcome(theirs, expected)}", "", f"{goal}: {'met' if met else 'missed'}")


def outcome(losses, expected) -> str:
    if len(losses) < STEPS:
        return f"out of memory in step {len(losses) + 1}"
    return f"finished, {'the same' if losses == expected else 'OTHER'} losses"


def mib(page_size: int) -> str:
    return f"{page_size / 2**17:g} MiB"


def gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB"
