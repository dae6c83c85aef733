# %% [markdown]
# # 9. Two processes
#
# > *"We moved prefill into a process of its own, so that long prompts no longer slow down the other users. Last night
# > that process died in the middle of one. Who owned the memory it was writing to?"*
#
# It is the right question. Computing a prompt elsewhere is easy. This lesson is about the hard part: knowing at any
# moment which process may write where, although the other side can fall silent between any two bytes. You will kill a
# real process, with the signal that cannot be caught, and not one token will be lost.
#
# **What to expect.** Two processes on your machine, one pool of pages between them, nine kinds of messages. The lesson
# needs Linux. The model is a toy, as in most lessons.

# %%
import json
import os
import random
import signal
import tempfile
import time
from inspect import getsource
from pathlib import Path
from typing import get_args

import figures
import tiny
import torch

from nanokv import LLM, DisaggConfig, SamplingParams
from nanokv.core.request import Request
from nanokv.disagg.channel import Channel
from nanokv.disagg.granted_cache import GrantedCache
from nanokv.disagg.grants import prefill_message
from nanokv.disagg.messages import AnyMessage, Message, Ping, encode, take_frames, unpack_ints
from nanokv.disagg.process import LocalWorker
from nanokv.disagg.supervisor import MAX_DEATHS, Supervisor
from nanokv.engine.transfers import MAX_ATTEMPTS

folder = Path(tempfile.mkdtemp())
Path(folder, "config.json").write_text(json.dumps(tiny.LLAMA), encoding="utf-8")


def engine(name: str, **fields) -> LLM:
    log = str(folder / f"{name}.jsonl")
    return LLM(
        str(folder), load="dummy", dtype="float32", device="cpu", num_pages=96, max_step_tokens=256, event_log=log,
        **fields,
    )  # fmt: skip


def request(name: str, prompt_tokens: int, answer_tokens: int) -> Request:
    generator = random.Random(name)
    prompt = [generator.randrange(3, 512) for _ in range(prompt_tokens)]
    return Request(prompt, SamplingParams(max_tokens=answer_tokens, temperature=0, ignore_eos=True), name)


def drain(llm: LLM) -> dict[str, list[int]]:
    """Steps until no work is left. Returns the answers by name."""
    answers = {}
    while llm.engine.has_work:
        answers |= {output.request_id: output.token_ids for output in llm.loop.step() if output.finished}
    return answers


def rows_of(llm: LLM) -> list[int]:
    """The number of rows of each step so far, read from the event log."""
    events = map(json.loads, Path(llm.config.event_log).read_text().splitlines())
    return [event["tokens"] for event in events if event["event"] == "step"]


# %% [markdown]
# ## Why
#
# Anna reads an answer, one row a step. Ben arrives with 800 tokens. In lesson 3 his prompt was cut into chunks, so Anna
# never waited for all of it at once. But each of her steps that carries a chunk takes longer. First we run one process,
# with a budget of 256 rows a step:

# %%
alone = engine("alone")
alone.engine.add_request(request("Anna", 40, 16))
for _ in range(4):
    alone.loop.step()
ben_alone = request("Ben", 800, 4)
alone.engine.add_request(ben_alone)
while ben_alone.num_computed < 800:
    alone.loop.step()
pages_alone = list(ben_alone.held.pages)[:50]
expected = drain(alone)
together = rows_of(alone)
assert together[4:8] == [256, 256, 256, 36]
assert sum(together[4:8]) == 800 + 4
print(together)

# %% [markdown]
# Four of Anna's steps carry up to 256 rows instead of 1. Now we run the same with a second process for prompts:
# **disaggregated prefill and decode** (Splitwise, Patel et al. 2024; DistServe, Zhong et al. 2024). It takes one more
# argument.
#
# We want to see what happens *while* Ben's prompt is away, so we stop the prefill process with SIGSTOP before Ben
# arrives. A stopped process is alive, and does nothing. We also record the messages in both directions.

# %%
wire: list[tuple[str, AnyMessage | Message]] = []
send, hear = Channel.send, Supervisor._hear


def tapped_send(self: Channel, message: Message, descriptor: int | None = None) -> None:
    wire.append(("->", message))
    send(self, message, descriptor)


def tapped_hear(self: Supervisor, slot, message: AnyMessage) -> None:
    wire.append(("<-", message))
    hear(self, slot, message)


Channel.send, Supervisor._hear = tapped_send, tapped_hear


def worker() -> LocalWorker:
    return llm.cluster.dispatcher.workers.slots[0].peer


llm = engine("split", disagg=DisaggConfig(min_tokens=64, heartbeat_s=60))
assert llm.stats()["prefill_workers_ready"] == 1 and worker().pid != os.getpid()

llm.engine.add_request(request("Anna", 40, 16))
for _ in range(4):
    llm.loop.step()
os.kill(worker().pid, signal.SIGSTOP)
ben = request("Ben", 800, 4)
llm.engine.add_request(ben)
answers = {}
while "Anna" not in answers:
    answers |= {output.request_id: output.token_ids for output in llm.loop.step() if output.finished}

assert rows_of(llm) == [40] + [1] * 15
assert llm.stats()["requests_remote"] == 1 and ben.in_transfer and len(ben.held.pages) == 50
os.kill(worker().pid, signal.SIGCONT)
answers |= drain(llm)
apart = rows_of(llm)
assert answers == expected and apart == [40] + [1] * 18

# %%
figure, (left, right) = figures.new(8.4, 3.1, 2, sharey=True)
left.bar(range(1, len(together) + 1), together, color=figures.ORANGE, width=0.8)
left.set(title="one process", xlabel="step", ylabel="rows in the step")
right.bar(range(1, len(apart) + 1), apart, color=figures.BLUE, width=0.8)
right.set(title="prompts of 64 tokens and more elsewhere", xlabel="step")
left.annotate("Ben's prompt", (8, 230), (10, 200), arrowprops={"arrowstyle": "->"}, va="center")
figures.save(figure, "09_two_processes-1")

# %% [markdown]
# ![Rows in each step, with one process and with two](img/09_two_processes-1.svg)
#
# Anna received 16 tokens, and no step of this process had more than her one row (apart from the 40 of her own prompt:
# it is shorter than `min_tokens`, so a transfer is not worth it). Then we let the other process go on. Both answers
# equal those of one process, token for token.
#
# Ben's first token did not come sooner. Disaggregation does not make prefill faster. It keeps prefill out of the way of
# other requests.
#
# ## How a prompt is transferred
#
# Where are Ben's keys and values now? In *our* pool, in the pages that we chose. These are the recorded messages:

# %%
assert len(get_args(AnyMessage)) == 9
said = [(way, message) for way, message in wire if not isinstance(message, Ping)]  # PING: still at work
kinds = [(way, type(message).__name__) for way, message in said]
print(kinds)
assert kinds == [("->", "Hello"), ("<-", "Hello"), ("->", "Prefill"), ("<-", "Done")]
hello, _, prefill, done = (message for _, message in said)
assert hello.memory.kind == "memfd" and hello.memory.num_bytes == llm.engine.store.pages.data.numel()
assert len(done.tokens) == 1 and done.tokens[0] == answers["Ben"][0]
print(getsource(prefill_message))

# %% [markdown]
# There are four messages. HELLO carries a **file descriptor**: the pool lies in an unnamed file in memory (a *memfd*),
# and a descriptor can be sent over a UNIX socket. The other process maps the file, and from then on both processes see
# the same bytes.
#
# So PREFILL does not carry any keys or values. It lists the tokens, and the pages that are granted. DONE says that
# every page is written, and carries the first token. No page ever moved.

# %%
on_the_wire, in_the_pages = len(encode(prefill)), 800 * llm.stats()["bytes_per_token"]
assert in_the_pages == 409_600 and on_the_wire < 4_000
assert len(prefill.tokens) + len(prefill.pages) == 4 * (800 + 50) == 3_400

pages_apart = list(unpack_ints(prefill.pages))
assert len(pages_apart) == len(pages_alone) == 50
assert torch.equal(llm.engine.store.pages.data[pages_apart], alone.engine.store.pages.data[pages_alone])

llama = 128 * 1024 * 16_384  # bytes of 16K tokens of Llama-3.1-8B, lesson 5
assert llama == 2 * 2**30 and 4 * (16_384 + 16_384 // 16) == 68 * 1024
assert round(llama / 12.5e9, 2) == 0.17

# %% [markdown]
# The message has 3.4 KB of token and page numbers, for 400 KiB of keys and values. For 16K tokens of Llama-3.1-8B it
# would be 68 KiB for 2 GiB. And the other process has written exactly what this one would have written: all 50 pages
# are bitwise equal.
#
# (Two hosts have no memory in common. Then the bytes must travel: 2 GiB take 0.17 s at 100 Gbit/s. The engine sends
# them layer by layer while later layers are computed. The LAYERS message does this.)
#
# It is eerie to watch. Stop the worker, send it a prompt, clear the prompt's pages, let the worker go on, and do
# *nothing* here:


# %%
def transferred(name: str) -> Request:
    """A prompt of 640 tokens, transferred to a worker that is stopped."""
    os.kill(worker().pid, signal.SIGSTOP)
    sent = request(name, 640, 4)
    llm.engine.add_request(sent)
    llm.loop.step()
    assert sent.in_transfer and len(sent.held.pages) == 40
    return sent


def wait_until(holds, work=lambda: time.sleep(0.01)) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        work()


cleo = transferred("Cleo")
theirs = llm.engine.store.pages.data[list(cleo.held.pages)] * 0
llm.engine.store.pages.data[list(cleo.held.pages)] = theirs
steps = llm.stats()["steps"]
os.kill(worker().pid, signal.SIGCONT)
wait_until(lambda: llm.engine.store.pages.data[list(cleo.held.pages)].any())
assert llm.stats()["steps"] == steps  # this process ran no step
answers = drain(llm)

# %% [markdown]
# Bytes appear in our memory that no line of this process has written.
#
# ## Messages in a stream
#
# A socket carries a stream of bytes and knows no messages. It may deliver half of one, or three and a half. So each
# message begins with its length, four bytes, and the reader takes whole messages from the front and leaves the rest.

# %%
print(getsource(take_frames))

stream = encode(prefill) + encode(done) + encode(Ping(generation=prefill.generation))
for size in (1, 7, 1000, len(stream)):
    buffer, seen = bytearray(), []
    for start in range(0, len(stream), size):
        buffer += stream[start : start + size]
        seen += take_frames(buffer)
    assert [type(message).__name__ for message in seen] == ["Prefill", "Done", "Ping"] and not buffer
assert seen[0] == prefill

half = bytearray(encode(done)[:-1])
assert take_frames(half) == []  # the writer was killed in the middle: no message, not a wrong one

# %% [markdown]
# However the bytes are cut, the reader gets the same three messages. And if the writer is killed half way, its last
# message is never complete, and so never read.
#
# ## kill -9
#
# Now the question at the top. A page that is granted is **quarantined**: it belongs to its request, and another process
# may write into it. Follow the pool. First, Dora cancels while her prompt is away.

# %%
story = []


def note(label: str) -> None:
    llm.engine.cache.check()
    counts = llm.stats()
    story.append((label, counts["pages_free"], counts["pages_held"], counts["pages_cached"]))


llm.reset_prefix_cache()
note("before")
dora = transferred("Dora")
note("granted")
llm.engine.abort("Dora")
llm.loop.step()
note("she gives up")
time.sleep(0.2)
llm.loop.step()
note("we wait")
assert [one[1:] for one in story] == [(96, 0, 0), (56, 40, 0), (56, 40, 0), (56, 40, 0)]

# %% [markdown]
# Dora has cancelled, ABORT is on its way, the worker does not answer, and her 40 pages stay quarantined. Is that not
# wasteful? Why not give them to other requests after a while?
#
# This is the trap. **A timeout is not a death.** A worker that has been silent for a minute may be swapped out, or
# stopped in a debugger, or waiting for a disk. Suppose that its pages go to Emil. When the worker wakes up, it
# continues exactly where it was, and writes Dora's keys over Emil's. Emil gets an answer to a text that he has never
# seen. There is no log line and no error.
#
# So a page comes back in one of three ways: the worker says that it has finished (DONE or FAILED), the worker says that
# it has stopped (ABORT_ACK), or the worker **is dead**. And the last one can be enforced.

# %%
print(getsource(LocalWorker.kill))
print(getsource(LocalWorker.gone.fget))

victim = worker()
os.kill(victim.pid, signal.SIGKILL)  # kill -9
wait_until(lambda: llm.stats()["requests_remote"] == 0, llm.loop.step)
note("kill -9")
assert story[-1] == ("kill -9", 96, 0, 0) and llm.stats()["worker_deaths"] == 1
assert victim is not worker()

# %% [markdown]
# No process can catch SIGKILL, and it ends a stopped process, too. But it does not work at once. A **pidfd**, a
# descriptor of the process, becomes readable when its last thread has ended, and then nothing is left that could write.
# Only then did the 40 pages come back. The heartbeat has its place: after `heartbeat_s` of silence the worker is
# *killed*, and then everything follows the same path.
#
# The prefill process has nothing to clean up, by design. It owns nothing: no page, no table, no tree. That is why it
# has no shutdown protocol, and why killing it is the normal way to end it.
#
# ## And no user notices
#
# A new worker has started meanwhile. Wait for it, transfer a prompt, kill the worker again, and stay for the answer.

# %%
wait_until(lambda: llm.stats()["prefill_workers_ready"] == 1, llm.loop.step)
emil = transferred("Emil")
note("granted again")
os.kill(worker().pid, signal.SIGKILL)
answers = drain(llm)
note("answered")

alone.engine.add_request(request("Emil", 640, 4))
assert answers["Emil"] == drain(alone)["Emil"]
counts = llm.stats()
print({name: counts[name] for name in ("remote_prefills", "remote_lost", "worker_deaths", "stale_messages")})
assert (counts["remote_prefills"], counts["remote_lost"], counts["worker_deaths"]) == (4, 1, 2)
assert counts["preemptions"] == 1 and not emil.in_transfer and emil.num_attempts == 1
assert story[-1] == ("answered", 56, 0, 40) and counts["pages_locked"] == 0
assert (MAX_ATTEMPTS, MAX_DEATHS) == (2, 3)

# %%
figure, axes = figures.new(7.6, 3.4)
for place, (label, free, held, cached) in enumerate(story):
    granted = label not in ("before", "kill -9", "answered")
    parts = ((free, figures.PALE, "free"), (held, figures.RED if granted else figures.ORANGE, "quarantined"))
    y = 0
    for pages, colour, text in (*parts, (cached, figures.BLUE, "in the tree")):
        figures.box(axes, place - 0.4, y, 0.8, pages, colour, f"{pages}\n{text}" if pages else "")
        y += pages
    axes.text(place, -3, label, ha="center", va="top")
figures.bare(axes, (-0.6, len(story) - 0.4), (-12, 98))
axes.set_title("96 pages, and who may write into them")
figures.save(figure, "09_two_processes-2")

# %% [markdown]
# ![Pages free, quarantined and in the tree, at seven moments](img/09_two_processes-2.svg)
#
# Emil's tokens equal those of one process alone. The lost attempt counts as a preemption (lesson 3): his prompt waits
# again, and since no worker is up, it is computed here. No prompt is transferred more than twice, and after three
# deaths in a row no new worker is started. So a prompt that kills its worker cannot bring down the service.
#
# One problem is left. Suppose a worker on *another host* is cut off, its request is computed again, and then its old
# DONE arrives after all. Every attempt has a number that is never used twice, and every pool has a random
# **generation**. A message with another number or generation is dropped, and counted in `stale_messages`.
#
# ## What the prefill process is
#
# The nicest part is how little code it takes. The prefill process runs the same scheduler and the same runner as this
# one. Only its cache is different: it finds nothing, allocates nothing and evicts nothing, because everything has been
# decided already.

# %%
print(getsource(GrantedCache.match), getsource(GrantedCache.reserve), getsource(GrantedCache.commit), sep="\n")

# %% [markdown]
# ## When is it worth it?
#
# A transfer costs about a step: the worker must notice the message, and answer. A prompt that is computed here makes
# one step longer. So short prompts stay here. With a decode step of 20 ms and a prefill of 10,000 tokens a second,
# break-even is at 200 tokens: that many double the time of one step.

# %%
assert 0.020 * 10_000 == 200

# %% [markdown]
# Do not trust this estimate, measure it: `nanokv bench disagg` prints `break_even_tokens` for your machine.
#
# ## Read now
#
# 1. [`nanokv/disagg/messages.py`](../nanokv/disagg/messages.py): the protocol, all of it.
# 2. [`nanokv/disagg/dispatcher.py`](../nanokv/disagg/dispatcher.py): the docstring, `_close_attempt`; and
#    [`nanokv/disagg/supervisor.py`](../nanokv/disagg/supervisor.py), `_kill`, `_reap`.
# 3. [`nanokv/disagg/process.py`](../nanokv/disagg/process.py): 70 lines to be sure that a process is dead.
# 4. [`nanokv/disagg/shared_buffer.py`](../nanokv/disagg/shared_buffer.py): one pool, two processes.
# 5. [`nanokv/disagg/prefill_loop.py`](../nanokv/disagg/prefill_loop.py), `_checked`: never trust a message.
#
# ## Exercises
#
# - `nanokv.disagg.messages.take_frames`: messages from a stream
# - `nanokv.disagg.granted_cache.GrantedCache.match`: pages that the decode process has granted
# - `nanokv.disagg.granted_cache.GrantedCache.limit_chunk`: stop where a checkpoint is needed
# - `nanokv.disagg.granted_cache.GrantedCache.commit`: list the state copy that is due
#
# ## What you can now explain
#
# - What disaggregation improves (the time per token of other requests) and what it does not (the time to the request's
#   own first token).
# - Why page numbers travel and pages do not, and what changes between hosts.
# - Which process owns a page at any moment, and the three ways in which a page comes back.
# - Why a timeout is not a death, and what a pidfd is for.
# - What attempt numbers and generations are for.
#
# ## Where it loses
#
# - The weights are in memory twice, and either process may be idle while the other has too much to do.
# - Short prompts and mostly cached prompts: computing them here is faster than a transfer.
# - On one machine both processes share its cores and its memory bandwidth. Smoother does not mean faster.
# - Between hosts the network must carry every byte of the cache.

# %%
Channel.send, Supervisor._hear = send, hear
llm.close()
alone.close()
