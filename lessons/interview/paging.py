"""Paging: tables, counts, copies, and the trade-off of the page size."""

from nanokv.learn.cards import card


@card(
    question="Which kinds of waste does contiguous allocation have, and which remains with pages of 16 tokens? Give "
    "it in bytes for Llama-3.1-70B.",
    answer="Three: memory reserved for an answer that may never come, room left over inside a block, and gaps between "
    "blocks that fit no request. Pages remove the first and the third. The last page of a request remains, which is "
    "half full on average: over all lengths 7.5 tokens a request are empty, which is 2.3 MiB on the 70B.",
    follow_ups=("Which waste returns with a page of 256 tokens?", "How would you show fragmentation on a live engine?"),
    file="nanokv/cache/pool.py",
    command="nanokv size llama-3.1-70b --context 8191,8192,8193",
)
def waste():
    from nanokv.bench.size import measure

    layout = measure("llama-3.1-70b", "bfloat16", "raw", 16).layout
    empty = sum(layout.pages_for(n) * 16 - n for n in range(1, 17)) / 16
    return {"7.5": empty, "2.3": empty * layout.bytes_per_token / 2**20}


@card(
    question="What does the page size trade off? Two prompts share their first 100 tokens; try pages of 1, 16 and 64.",
    answer="Sharing wants small pages: a match is whole pages, so 100, 96 and 64 tokens of the 100 are found. And "
    "each request wastes half a page. Everything else wants large pages: the table of a context of 8,192 tokens has "
    "8,192, 512 or 128 entries, and each entry is a look-up in the kernel's inner loop and a unit of the allocator's "
    "work. At 16 the kernel already reads runs of kilobytes, so larger pages gain little.",
    follow_ups=("Why do hybrids often need larger pages?", "Can the hash granularity and the page size differ?"),
    file="nanokv/bench/prefix.py",
    command="nanokv chat --page-size 64 -p 'Hello'",
)
def size_of_a_page():
    from nanokv.bench.prefix import matchable

    found = [matchable(1000, 100, size) for size in (1, 16, 64)]
    return {
        "100": found[0],
        "96": found[1],
        "64": found[2],
        "8,192": 8192 // 1,
        "512": 8192 // 16,
        "128": 8192 // 64,
    }


@card(
    question="SmolLM2-135M in bf16, pages of 16 tokens, page table [5, 9, 2]. At which byte of the pool are the keys "
    "of layer 3, head 1, position 37?",
    answer="Position 37 is in entry 2 of the table, at slot 5; the table says page 2. A page is one block of 368,640 "
    "bytes, so it starts at 737,280. Inside, the keys of layer 3 start at 36,864. A head takes 2,048 bytes, a token "
    "128 of them. So 36,864 plus 2,048 plus 5 times 128 is 39,552 in the page, and byte 776,832 of the pool. Only one "
    "step is not arithmetic: the table look-up.",
    follow_ups=("Where in a kernel does that look-up cost time?", "What would change with one pool for each layer?"),
    file="nanokv/core/spec.py",
    command="nanokv size smollm2-135m-instruct",
)
def an_address():
    from nanokv.bench.size import measure

    layout = measure("smollm2-135m-instruct", "bfloat16", "raw", 16).layout
    slot = layout.paged(3, "k")
    page, place = [5, 9, 2][37 // 16], 37 % 16
    _, tokens, dim = slot.plane.shape
    token = dim * slot.plane.dtype.itemsize
    inside = slot.offset + 1 * tokens * token + place * token
    return {
        "2": page,
        "5": place,
        "368,640": layout.page_bytes,
        "737,280": page * layout.page_bytes,
        "36,864": slot.offset,
        "2,048": tokens * token,
        "128": token,
        "39,552": inside,
        "776,832": page * layout.page_bytes + inside,
    }


@card(
    question="Four samples of one prompt of 40 tokens, pages of 16. How many pages are held after the first token, "
    "and which samples copy?",
    answer="The prompt takes 3 pages, the last one half full. All four samples hold all of them: counts of 4. Full "
    "pages stay shared. The half-full page is shared until the first write: a sample that finds a count above one "
    "copies it to a new page. So 3 copies, and the last writer finds a count of one and writes in place. 6 pages in "
    "all, not 12. A page is free when its count falls to zero.",
    follow_ups=("When is the copy made, relative to the step that writes?", "What if the pool is full at that moment?"),
    file="nanokv/cache/manager.py",
    command="nanokv learn solution 02.6 --give-up",
)
def copy_on_write():
    from nanokv.cache.pool import PagePool

    pool, copies = PagePool(16), 0
    tables = [pool.allocate(-(-40 // 16))]
    for _ in range(3):
        pool.share(tables[0])
        tables.append(list(tables[0]))
    counts = pool.count(tables[0][-1])
    for table in tables:
        if pool.count(table[-1]) > 1:
            pool.release([table[-1]])
            table[-1] = pool.allocate(1)[0]
            copies += 1
    assert copies == len(tables[0]) == 3
    return {"3": copies, "4": counts, "6": 16 - pool.num_free, "12": sum(map(len, tables))}


@card(
    question="Paged attention borrows from operating systems. Where does the analogy end?",
    answer="Tables, reference counts and copy-on-write are the same ideas. But there are no page faults: the "
    "scheduler reserves every page before the step, because a kernel cannot stop and wait. Tables are per sequence "
    "and in software. Nothing is zeroed: memory beyond a sequence is never read. And a page is large, 2,097,152 bytes "
    "for Llama-3.1-8B against 4,096 in a common system. Evicted pages are mostly recomputed, not swapped.",
    follow_ups=(
        "vAttention uses the GPU's own page tables. What does it win and lose?",
        "What corresponds to the TLB?",
    ),
    file="nanokv/cache/manager.py",
    command="nanokv size llama-3.1-8b",
)
def not_an_operating_system():
    import mmap

    from nanokv.bench.size import measure

    return {
        "2,097,152": measure("llama-3.1-8b", "bfloat16", "raw", 16).layout.page_bytes,
        "4,096": min(mmap.PAGESIZE, 4096),
    }


@card(
    question="Why let one page hold all layers of 16 tokens, instead of one pool for each layer? Count the copies "
    "that move a page of Llama-3.1-8B.",
    answer="With a pool for each layer, and keys apart from values, moving 16 tokens takes 64 copies of 32 KiB. Here "
    "a page is one block: 1 copy of 2 MiB. Transfer to another process, copy-on-write and tiers all become one "
    "operation on a page id. The price: a kernel reads runs of 32 KiB at a stride, which costs nothing, and all "
    "layers must share one page size. Layers lie side by side in a page, so a group can be sent before the rest is "
    "computed.",
    follow_ups=("What if half of the layers have a sliding window?", "How do layers of different dtypes share a page?"),
    file="nanokv/core/spec.py",
    command="nanokv size llama-3.1-8b",
)
def one_block():
    from nanokv.bench.size import measure

    layout = measure("llama-3.1-8b", "bfloat16", "raw", 16).layout
    planes = [plane for spec in layout.specs for plane in spec.paged]
    start, end = layout.layer_range(0, layout.num_layers)
    return {
        "64": len(planes),
        "32": planes[0].num_bytes / 1024,
        "1": (end - start) / layout.page_bytes,
        "2": layout.page_bytes / 2**20,
        "16": layout.page_size,
    }
