#include "attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <string>

#include "kernels/kernels.h"
#include "scratch.h"

namespace penguin {
namespace {

// How work is divided follows from the shapes alone, so that a result never depends on how many threads there are.
// A decoding step is divided by KV heads and, where these are few, by slots: long runs are read faster than short ones.
constexpr std::int64_t kTasksOfDecode = 16;
constexpr std::int64_t kLeastSlotsPerSplit = 256;
constexpr std::int64_t kSlotStep = 64;       // a multiple of the slots that any kernel takes at once
constexpr std::int64_t kRowsPerBlock = 132;  // a multiple of the rows that any kernel takes at once
// Products below which waking other threads costs more than it saves: about 20 microseconds of one thread.
constexpr std::int64_t kProductsWorthThreads = 1 << 18;

std::string text(std::int64_t x) { return std::to_string(x); }

std::int64_t parts(std::int64_t whole, std::int64_t part) { return (whole + part - 1) / part; }

bool aligned(const void* p, std::size_t to) { return reinterpret_cast<std::uintptr_t>(p) % to == 0; }

std::size_t bytes_of(CacheType type) { return type == CacheType::f32 ? 4 : type == CacheType::f16 ? 2 : 1; }

Status check_sizes(const Attention& a) {
    if (a.size < kSmallestHead || a.size > kLargestHead || a.size % kHeadStep != 0) {
        return Status::error("got heads of size " + text(a.size) + ", wanted a multiple of " + text(kHeadStep) +
                             " from " + text(kSmallestHead) + " to " + text(kLargestHead));
    }
    if (a.kv_heads < 1 || a.heads < 1 || a.heads % a.kv_heads != 0) {
        return Status::error("got " + text(a.heads) + " query heads and " + text(a.kv_heads) +
                             " KV heads, wanted at least one of each and a whole number of query heads per KV head");
    }
    if (a.rows < 0 || a.start < 0 || a.capacity < 0 || a.rows > a.capacity || a.start > a.capacity - a.rows) {
        return Status::error("got " + text(a.rows) + " rows from slot " + text(a.start) + " on, wanted slots 0 to " +
                             text(a.capacity - 1) + ", which is what the cache has");
    }
    if (!(a.scale >= 0) || std::isinf(a.scale)) {
        return Status::error("got the scale " + std::to_string(a.scale) +
                             ", wanted a positive number, or 0 for 1 / sqrt(size)");
    }
    return {};
}

Status check_buffer(const void* p, std::size_t alignment, const char* name) {
    if (!p) return Status::error(std::string("got no buffer for ") + name);
    if (aligned(p, alignment)) return {};
    return Status::error(std::string("got ") + name + " at an address that " +
                         text(static_cast<std::int64_t>(alignment)) +
                         " does not divide, wanted one that the size of its numbers divides");
}

Status check_buffers(const Attention& a) {
    struct Named {
        const void* p;
        std::size_t alignment;
        const char* name;
        bool wanted = true;
    };
    const bool scaled = a.type == CacheType::i8;
    const Named buffers[] = {{a.q, 4, "q"},
                             {a.k, 4, "k"},
                             {a.v, 4, "v"},
                             {a.keys, bytes_of(a.type), "keys"},
                             {a.values, bytes_of(a.type), "values"},
                             {a.key_scales, 4, "key_scales", scaled},
                             {a.value_scales, 4, "value_scales", scaled},
                             {a.positions, 8, "positions"},
                             {a.cos, 4, "cos"},
                             {a.sin, 4, "sin"},
                             {a.out, 4, "out"}};
    for (const Named& buffer : buffers) {
        if (!buffer.wanted) {
            if (buffer.p) return Status::error(std::string("got ") + buffer.name + " beside a cache that is not int8");
            continue;
        }
        Status status = check_buffer(buffer.p, buffer.alignment, buffer.name);
        if (!status.ok()) return status;
    }
    if (a.keys == a.values) return Status::error("got one buffer for keys and values, wanted two");
    return {};
}

Status check_positions(const Attention& a) {
    for (std::int64_t i = 0; i < a.rows; i++) {
        if (a.positions[i] >= 0 && a.positions[i] < a.table_rows) continue;
        return Status::error("got position " + text(a.positions[i]) + " for row " + text(i) +
                             ", wanted one from 0 to " + text(a.table_rows - 1) + ", the rows of cos and sin");
    }
    return {};
}

// What the tasks of one call share.
struct Work {
    const Attention& call;
    const Kernels& kernels;
    float* partial = nullptr;  // [splits, heads, kPartialHeader + size]
    std::int64_t slots = 0;
    std::int64_t slots_per_split = 0;
    std::int64_t blocks = 0;
    std::int64_t rows_per_block = 0;
    std::atomic<bool> out_of_memory = false;
};

void append_head(void* data, std::size_t index) {
    const Work& work = *static_cast<Work*>(data);
    work.kernels.append(work.call, static_cast<std::int64_t>(index), 0, work.call.rows);
}

void decode_split(void* data, std::size_t index) {
    const Work& work = *static_cast<Work*>(data);
    const Attention& a = work.call;
    const std::int64_t splits = parts(work.slots, work.slots_per_split);
    const std::int64_t split = static_cast<std::int64_t>(index) % splits;
    const std::int64_t kv_head = static_cast<std::int64_t>(index) / splits;
    const std::int64_t begin = split * work.slots_per_split;
    const std::int64_t head = split * a.heads + kv_head * (a.heads / a.kv_heads);
    work.kernels.decode(a, kv_head, begin, std::min(begin + work.slots_per_split, work.slots),
                        work.partial + head * (kPartialHeader + a.size));
}

void prompt_block(void* data, std::size_t index) {
    Work& work = *static_cast<Work*>(data);
    const Attention& a = work.call;
    const std::int64_t rows = a.rows * (a.heads / a.kv_heads);
    // The last rows see the most slots: their blocks come first.
    const std::int64_t block = work.blocks - 1 - static_cast<std::int64_t>(index) / a.kv_heads;
    const std::int64_t first = block * work.rows_per_block;
    const Scratch scratch(work.kernels.prompt_scratch(work.rows_per_block, a.size));
    if (!scratch.get()) {
        work.out_of_memory = true;
        return;
    }
    work.kernels.prompt(a, static_cast<std::int64_t>(index) % a.kv_heads, first,
                        std::min(first + work.rows_per_block, rows), scratch.get());
}

// One head of the result from its splits.
void merge(const Work& work, std::int64_t head, std::int64_t splits) {
    const Attention& a = work.call;
    const std::int64_t width = kPartialHeader + a.size;
    const float* first = work.partial + head * width;
    float top = first[0];
    for (std::int64_t s = 1; s < splits; s++) top = std::max(top, first[s * a.heads * width]);
    float* out = a.out + head * a.size;
    std::fill_n(out, a.size, 0.f);
    float sum = 0;
    for (std::int64_t s = 0; s < splits; s++) {
        const float* partial = first + s * a.heads * width;
        const float factor = std::exp2(partial[0] - top);
        sum += partial[1] * factor;
        for (std::int64_t d = 0; d < a.size; d++) out[d] += partial[kPartialHeader + d] * factor;
    }
    for (std::int64_t d = 0; d < a.size; d++) out[d] /= sum;
}

Status out_of_memory() { return Status::error("got no memory for the attention of this call; use shorter prompts"); }

Status decode(Work& work, const ParallelFor& parallel) {
    const Attention& a = work.call;
    const std::int64_t wanted = std::min(parts(work.slots, kLeastSlotsPerSplit), parts(kTasksOfDecode, a.kv_heads));
    work.slots_per_split = parts(parts(work.slots, wanted), kSlotStep) * kSlotStep;
    const std::int64_t splits = parts(work.slots, work.slots_per_split);
    const Scratch scratch(static_cast<std::size_t>(splits * a.heads * (kPartialHeader + a.size)));
    if (!scratch.get()) return out_of_memory();
    work.partial = scratch.get();
    Status status = parallel.run(parallel.context, static_cast<std::size_t>(splits * a.kv_heads), decode_split, &work);
    if (!status.ok()) return status;
    for (std::int64_t head = 0; head < a.heads; head++) merge(work, head, splits);
    return {};
}

Status prompt(Work& work, const ParallelFor& parallel) {
    const Attention& a = work.call;
    const std::int64_t rows = a.rows * (a.heads / a.kv_heads);
    work.blocks = parts(rows, kRowsPerBlock);
    work.rows_per_block = parts(parts(rows, work.blocks), 12) * 12;  // whole steps of every kernel
    work.blocks = parts(rows, work.rows_per_block);
    Status status =
        parallel.run(parallel.context, static_cast<std::size_t>(work.blocks * a.kv_heads), prompt_block, &work);
    if (status.ok() && work.out_of_memory) return out_of_memory();
    return status;
}

}  // namespace

ParallelFor serial() {
    return {[](void*, std::size_t count, ParallelFor::Task task, void* data) {
                for (std::size_t i = 0; i < count; i++) task(data, i);
                return Status();
            },
            nullptr};
}

Status kv_attention(const Attention& given, const Kernels& kernels, const ParallelFor& parallel) {
    Status status = check_sizes(given);
    if (!status.ok() || given.rows == 0) return status;
    status = check_buffers(given);
    if (!status.ok()) return status;
    status = check_positions(given);
    if (!status.ok()) return status;

    Attention call = given;
    if (call.scale == 0) call.scale = 1.f / std::sqrt(static_cast<float>(call.size));
    Work work{call, kernels};
    work.slots = call.start + call.rows;
    const std::int64_t products = call.rows * call.heads * work.slots * call.size;
    const ParallelFor chosen = products < kProductsWorthThreads ? serial() : parallel;
    // A single row is stored sooner than another thread is awake.
    const ParallelFor appending = call.rows == 1 ? serial() : chosen;
    status = appending.run(appending.context, static_cast<std::size_t>(call.kv_heads), append_head, &work);
    if (!status.ok()) return status;
    return call.rows == 1 ? decode(work, chosen) : prompt(work, chosen);
}

}  // namespace penguin
