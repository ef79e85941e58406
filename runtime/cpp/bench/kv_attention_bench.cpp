// How long one layer's attention takes, on one thread, with caches that the processor has not at hand.
//
//   kv_attention_bench [--layers 12] [--rounds 11] [--heads 16] [--kv-heads 8] [--size 128] [--capacity 4096]
//
// The contenders take turns, round by round, so that what else the machine does meets all alike; times are CPU time of
// the thread. `read` is how fast this thread reads memory: what a step of decoding is up against. Lines are for people;
// the last line is one JSON object with every sample.
#include <ctime>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "attention.h"
#include "isa.h"
#include "penguin_ops.h"

namespace penguin {
namespace {

struct Setting {
    std::int64_t layers = 12, rounds = 11, heads = 16, kv_heads = 8, size = 128, capacity = 4096;
};

double seconds() {
    std::timespec now{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

const char* name_of(CacheType type) {
    return type == CacheType::f32 ? "fp32" : type == CacheType::f16 ? "fp16" : "int8";
}

std::size_t bytes_of(CacheType type) { return type == CacheType::f32 ? 4 : type == CacheType::f16 ? 2 : 1; }

// The caches of all layers in one type, filled with numbers of about 1.
struct Caches {
    Caches(const Setting& setting, CacheType of)
        : type(of), numbers(static_cast<std::size_t>(setting.kv_heads * setting.capacity * setting.size)) {
        const std::size_t slots = static_cast<std::size_t>(setting.kv_heads * setting.capacity);
        memory.resize(static_cast<std::size_t>(2 * setting.layers) * numbers * bytes_of(type));
        scales.assign(slots * static_cast<std::size_t>(2 * setting.layers), 0.01f);
        std::mt19937 random(1);
        for (std::size_t i = 0; i < memory.size(); i += 4) {
            const auto bits = static_cast<std::uint32_t>(random());
            // A float of 1 to 2, two float16 of 1 to 2, or four bytes.
            const std::uint32_t word = type == CacheType::f32   ? 0x3f800000u | (bits & 0x807fffffu)
                                       : type == CacheType::f16 ? 0x3c003c00u | (bits & 0x83ff83ffu)
                                                                : bits;
            std::memcpy(memory.data() + i, &word, 4);
        }
    }
    void* cache(std::int64_t layer, int which) {
        return memory.data() +
               (2 * static_cast<std::size_t>(layer) + static_cast<std::size_t>(which)) * numbers * bytes_of(type);
    }
    CacheType type;
    std::size_t numbers;
    std::vector<unsigned char> memory;
    std::vector<float> scales;
};

struct Samples {
    std::string name;
    std::vector<double> milliseconds;
    double bytes = 0;  // read per layer
};

void measure(const Setting& setting, std::vector<std::unique_ptr<Caches>>& caches, std::int64_t rows,
             std::int64_t slots, std::string& json) {
    const auto count = [&](std::int64_t heads) { return static_cast<std::size_t>(rows * heads * setting.size); };
    std::vector<float> q(count(setting.heads), 0.1f), k(count(setting.kv_heads), 0.2f), v(k), out(q.size());
    std::vector<float> cos(static_cast<std::size_t>(setting.capacity * setting.size / 2), 0.6f), sin(cos.size(), 0.8f);
    std::vector<std::int64_t> positions(static_cast<std::size_t>(rows), slots - 1);
    const std::int64_t layers = rows == 1 ? setting.layers : std::min<std::int64_t>(setting.layers, 3);
    std::vector<Samples> all;
    for (std::int64_t round = 0; round < setting.rounds; round++) {
        std::size_t at = 0;
        for (const Isa isa : kIsas) {
            for (auto& cache : caches) {
                if (!supported(isa)) continue;
                if (round == 0) {
                    const double width = static_cast<double>(bytes_of(cache->type)) +
                                         (cache->type == CacheType::i8 ? 4. / static_cast<double>(setting.size) : 0.);
                    const auto numbers = static_cast<double>(2 * setting.kv_heads * slots * setting.size);
                    all.push_back({std::string(name_of(cache->type)) + " " + name_of(isa), {}, numbers * width});
                }
                Attention call;
                call.q = q.data(), call.k = k.data(), call.v = v.data(), call.out = out.data();
                call.positions = positions.data(), call.cos = cos.data(), call.sin = sin.data();
                call.rows = rows, call.start = slots - rows, call.heads = setting.heads,
                call.kv_heads = setting.kv_heads;
                call.size = setting.size, call.capacity = call.table_rows = setting.capacity, call.type = cache->type;
                const double begin = seconds();
                for (std::int64_t layer = 0; layer < layers; layer++) {
                    call.keys = cache->cache(layer, 0), call.values = cache->cache(layer, 1);
                    if (call.type == CacheType::i8) {
                        const std::size_t of_layer =
                            cache->scales.size() / static_cast<std::size_t>(2 * setting.layers);
                        call.key_scales = cache->scales.data() + 2 * static_cast<std::size_t>(layer) * of_layer;
                        call.value_scales = call.key_scales + of_layer;
                    }
                    const Status status = kv_attention(call, kernels_of(isa, setting.size), serial());
                    if (!status.ok()) {
                        std::fprintf(stderr, "%s\n", status.sentence().c_str());
                        std::exit(1);
                    }
                }
                all[at++].milliseconds.push_back((seconds() - begin) * 1e3 / static_cast<double>(layers));
            }
        }
    }
    std::printf("%lld rows, %lld positions\n", static_cast<long long>(rows), static_cast<long long>(slots));
    for (Samples& samples : all) {
        json += (json.empty() ? "" : ", ") + std::string("{\"rows\": ") + std::to_string(rows) +
                ", \"positions\": " + std::to_string(slots) + ", \"kernel\": \"" + samples.name + "\", \"ms\": [";
        for (std::size_t i = 0; i < samples.milliseconds.size(); i++) {
            json += (i ? ", " : "") + std::to_string(samples.milliseconds[i]);
        }
        json += "]}";
        std::vector<double> sorted = samples.milliseconds;
        std::sort(sorted.begin(), sorted.end());
        std::printf("  %-14s best %9.4f ms  median %9.4f ms  %6.1f GB/s\n", samples.name.c_str(), sorted.front(),
                    sorted[sorted.size() / 2], samples.bytes / sorted.front() / 1e6);
    }
}

double read_speed(const Caches& caches) {
    double best = 0;
    for (int round = 0; round < 5; round++) {
        const double begin = seconds();
        std::uint64_t sum[8] = {};
        for (std::size_t i = 0; i + 64 <= caches.memory.size(); i += 64) {
            std::uint64_t words[8];
            std::memcpy(words, caches.memory.data() + i, 64);
            for (int j = 0; j < 8; j++) sum[j] += words[j];
        }
        volatile std::uint64_t keep = sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
        static_cast<void>(keep);
        best = std::max(best, static_cast<double>(caches.memory.size()) / (seconds() - begin) / 1e9);
    }
    return best;
}

int run(int argc, char** argv) {
    Setting setting;
    const std::map<std::string, std::int64_t*> options = {
        {"--layers", &setting.layers},     {"--rounds", &setting.rounds}, {"--heads", &setting.heads},
        {"--kv-heads", &setting.kv_heads}, {"--size", &setting.size},     {"--capacity", &setting.capacity}};
    for (int i = 1; i < argc; i += 2) {
        const auto option = options.find(argv[i]);
        if (option == options.end() || i + 1 == argc || std::atoll(argv[i + 1]) < 1) {
            std::fprintf(stderr,
                         "got '%s', wanted one of --layers --rounds --heads --kv-heads --size --capacity, and a "
                         "positive number after it\n",
                         argv[i]);
            return 2;
        }
        *option->second = std::atoll(argv[i + 1]);
    }
    std::vector<std::unique_ptr<Caches>> caches;
    for (const CacheType type : {CacheType::f32, CacheType::f16, CacheType::i8}) {
        caches.push_back(std::make_unique<Caches>(setting, type));
    }
    const double read = read_speed(*caches.front());
    std::printf("read %.1f GB/s\n", read);
    std::string json;
    for (const std::int64_t rows : {1, 128}) {
        for (std::int64_t slots : {64, 128, 1024, 4096}) {
            if (slots >= rows && slots <= setting.capacity) measure(setting, caches, rows, slots, json);
        }
    }
    std::printf("{\"version\": \"%s\", \"read_gb_per_s\": %.3f, \"runs\": [%s]}\n", PENGUIN_OPS_VERSION, read,
                json.c_str());
    return 0;
}

}  // namespace
}  // namespace penguin

int main(int argc, char** argv) { return penguin::run(argc, argv); }
