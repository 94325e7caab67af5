"""The page table of a paged optimizer: which pages are on the device, and how they come and go.

A page holds the optimizer's states of a range of the flat parameters. Its home is pinned host
memory, and a frame is device memory that holds it for a while. There are two kinds of frame:

    own frame   It holds one page as long as the budget has room for it. If a forward or backward
                pass finds no memory, the pages used longest ago are written home and their frames
                are freed. The next step brings these pages back.
    slot        All other pages stream through a few slots during a step: page k + 1 comes in while
                page k is updated and page k - 1 goes out.

Copies and updates are in three queues (streams.py), so each has to wait for what it builds on. Few
waits are needed, because a queue runs in order. In particular a copy "in" never waits for the
page's home: the page lost its slot to another page, whose copy had waited for the slot's last
store.
"""

import contextlib
import threading

import numpy as np

SLOTS = 3  # one page comes in, one is updated, one goes out


class Page:
    """A range of the flat parameters, and where its states are."""

    def __init__(self, part: slice, nbytes: int):
        self.part, self.nbytes = part, nbytes
        self.size = part.stop - part.start
        self.home = self.frame = None
        self.used = 0  # the step that last updated it


class Frame:
    """Device memory that holds a page, or none. It is dirty if the page's home is out of date."""

    def __init__(self, memory):
        self.memory, self.page, self.dirty = memory, None, False
        self.loaded = self.stored = None  # events; `loaded` only until something waited for it


class PageTable:
    """Pages for these parts of the flat space, on a device.

    state: the format of the states, see Float32 in paged.py. budget: bytes of device memory that
    frames may take, or None. pageable: homes are in ordinary host memory. ValueError if the budget
    is too small for the slots, MemoryError if the host has no room for the homes.
    Hold `lock` while calling any method but evict.
    """

    def __init__(self, parts, state, device, budget, pageable):
        self.state, self.device, self.budget = state, device, budget
        self.layouts = {n: _layout(state, n) for n in {p.stop - p.start for p in parts}}
        self.pages = [Page(p, self.layouts[p.stop - p.start][1]) for p in parts]
        self.frame_bytes = max(page.nbytes for page in self.pages)
        self.total = sum(page.nbytes for page in self.pages)
        self.spare = max(map(state.spare, self.layouts))
        self.nbytes = 0  # bytes of all frames
        self.slots, self.lock = [], threading.Lock()
        self.busy, self.begun = 0, False  # threads that update; are pages back?
        streams = budget is not None and budget < self.total
        if streams and budget < SLOTS * self.frame_bytes:
            raise ValueError(f"a device_budget of {budget:,} bytes is below {SLOTS} pages of "
                             f"{self.frame_bytes:,} bytes, through which states stream")
        try:
            self._make_homes(pageable)
            if streams:
                self._make_slots(SLOTS)
            self.bring_back()
        except BaseException:
            self.close()
            raise

    def _make_homes(self, pageable):
        for i, page in enumerate(self.pages):
            try:
                page.home = self.device.home(page.nbytes, pageable)
            except MemoryError as error:
                got = sum(p.nbytes for p in self.pages[:i])
                advice = "" if pageable else "; pageable=True uses ordinary memory, which is slower"
                raise MemoryError(f"the states need {self.total:,} bytes of host memory, only "
                                  f"{got:,} could be had{advice} ({error})") from None
            # This also touches every byte; the first touch of a byte is slow.
            for array, zeros in zip(self.arrays(page, page.home), self.state.zeros(page.size, np)):
                array[...] = zeros

    def arrays(self, page: Page, memory) -> tuple:
        """A page's states as views of its home or of a frame."""
        places, _ = self.layouts[page.size]
        return tuple(memory[place].view(dtype) for place, dtype in places)

    @contextlib.contextmanager
    def in_use(self):
        """Inside, no page loses its frame."""
        with self.lock:
            self.busy += 1
        try:
            yield
        finally:
            with self.lock:
                self.busy -= 1
                self.begun = self.begun and self.busy > 0

    def begin(self):
        """Bring pages back: once for all threads that update together, before any of them does."""
        if not self.begun:
            self.bring_back()
            self.begun = True

    def bring_back(self):
        """Give each page a frame of its own, as far as there is room; make slots for the rest."""
        with self._spared():
            for page in self.pages:
                if page.frame is None and not self._return(page):
                    break
            if missing := sum(page.frame is None for page in self.pages):
                self._make_slots(min(SLOTS, missing))

    def load(self, page: Page) -> Frame:
        """The slot with the page in it. It moves to the end of the row: others are reused first."""
        frame = self._slot_with(page) or self.slots[0]
        if frame.page is not page:
            if frame.dirty:
                self.store(frame)  # an earlier attempt failed
            if frame.stored:
                self.device.wait("in", frame.stored)
            self._copy_in(page, frame)
        self.slots.remove(frame)
        self.slots.append(frame)
        return frame

    def store(self, frame: Frame):
        """Copy the frame's page home, after its update."""
        self.device.wait("out", self.device.record("update"))
        self.device.copy_out(frame.page.home, frame.memory[: frame.page.nbytes])
        frame.stored, frame.dirty = self.device.record("out"), False

    def prefetch(self):
        """Begin to load the pages that the next step needs first."""
        for page in [page for page in self.pages if page.frame is None][: len(self.slots)]:
            self.load(page)

    def evict(self, nbytes: int) -> int:
        """Free nbytes of device memory, or as much as can be; returns how many bytes were freed.

        Pages go home in the order in which they were used. Slots stay. If there are too few slots,
        the frames of the first pages become slots. During an update nothing is freed.
        """
        if not self.lock.acquire(blocking=False):
            return 0
        try:
            going, free, slots = [], 0, len(self.slots)
            pages = [] if self.busy else [page for page in self.pages if page.frame]
            for page in sorted(pages, key=lambda page: page.used):
                if free >= nbytes:
                    break
                becomes_slot = slots < SLOTS and page.nbytes == self.frame_bytes
                slots, free = slots + becomes_slot, free + (not becomes_slot) * page.nbytes
                going.append(page)
            if free:
                self._send_home(going)
            return free
        finally:
            self.lock.release()

    def flush(self):
        """Write every page that has changed home, and wait until all are there."""
        for frame in [*self.slots, *(page.frame for page in self.pages if page.frame)]:
            if frame.dirty:
                self.store(frame)
        self.device.synchronize()

    def forget(self):
        """Drop every page on the device, without a copy home. Nothing may be running there."""
        for page in self.pages:
            if page.frame:
                self._free(page.frame)
                page.frame = None
        for frame in self.slots:
            frame.page = None

    def close(self):
        """Wait for all copies, then give back all memory."""
        self.device.synchronize()
        self.forget()
        while self.slots:
            self._free(self.slots.pop())
        for page in self.pages:
            if page.home is not None:
                self.device.free(home=page.home)
                page.home = None
        self.device.close()

    @contextlib.contextmanager
    def _spared(self):
        """Inside, the extra memory of an update stays free; pages go home if they must."""
        memory = None
        while self.spare and memory is None:
            try:
                memory = self.device.frame(self.spare, "update")
            except MemoryError:
                going = [page for page in self.pages if page.frame][-SLOTS - 1 :]
                if not going:
                    raise
                self._send_home(going)
        try:
            yield
        finally:
            if memory is not None:
                self.device.free(memory)

    def _frame(self, nbytes):
        """A frame, or None if there is no room."""
        if self.budget is not None and self.nbytes + nbytes > self.budget:
            return None
        try:
            memory = self.device.frame(nbytes)
        except MemoryError:
            return None
        self.nbytes += nbytes
        self.device.wait("in", self.device.record("main"))  # which may still use this memory
        return Frame(memory)

    def _free(self, frame):
        self.nbytes -= frame.memory.size
        self.device.free(frame.memory)

    def _slot_with(self, page):
        return next((frame for frame in self.slots if frame.page is page), None)

    def _copy_in(self, page, frame):
        self.device.copy_in(frame.memory[: page.nbytes], page.home)
        frame.page, frame.loaded = page, self.device.record("in")

    def _return(self, page):
        """Give the page a frame of its own; False if there is no room."""
        frame, slot = self._frame(page.nbytes), self._slot_with(page)
        if frame is None:
            return False
        try:
            if slot and slot.dirty:
                self.store(slot)
            if slot and slot.stored:
                self.device.wait("in", slot.stored)
            self._copy_in(page, frame)
        except BaseException:
            self.device.synchronize()
            self._free(frame)
            raise
        page.frame = frame
        if slot:
            slot.page = None
        return True

    def _make_slots(self, count):
        """Make up to `count` slots. If there is no room for any, frames of pages become slots."""
        while len(self.slots) < count and (frame := self._frame(self.frame_bytes)):
            self.slots.append(frame)
        if not self.slots:
            full = [p for p in self.pages if p.frame and p.nbytes == self.frame_bytes]
            self._send_home(full[-SLOTS:])
        if not self.slots:
            raise MemoryError(f"the device has no room for {self.frame_bytes:,} bytes, a page of "
                              "the optimizer's states")

    def _send_home(self, pages):
        for page in pages:
            if page.frame.dirty:
                self.store(page.frame)
        self.device.synchronize()
        for page in pages:
            frame, page.frame = page.frame, None
            if len(self.slots) < SLOTS and page.nbytes == self.frame_bytes:
                self.slots.insert(0, frame)  # with the page in it
            else:
                self._free(frame)


def _layout(state, n):
    """([(slice of bytes, dtype) for each array of n parameters' states], bytes of all)."""
    places, end = [], 0
    for array in state.zeros(n, np):
        places.append((slice(end, end + array.nbytes), array.dtype))
        end = -(-places[-1][0].stop // 16) * 16  # the kernels need arrays to begin at these
    return places, end
