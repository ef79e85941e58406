// The operators inside ONNX Runtime: a session made from nodes built here, with buffers that are shared and that are
// not. Arguments: the paths of libonnxruntime and libpenguin_ort_ops.
#include <dlfcn.h>
#include <onnxruntime_c_api.h>

#include <cstdlib>
#include <thread>

#include "onnx_model.h"
#include "problem.h"
#include "testing.h"

namespace penguin {
namespace {

constexpr std::uint32_t kApi = 24;

const OrtApi* api = nullptr;
OrtEnv* env = nullptr;
std::string operators;

void must(OrtStatus* status) {
    if (!status) return;
    std::printf("FAILED %s\n", api->GetErrorMessage(status));
    std::exit(1);
}

std::string said(OrtStatus* status) {
    if (!status) return "";
    const std::string sentence = api->GetErrorMessage(status);
    api->ReleaseStatus(status);
    return sentence;
}

const char* const kNames[] = {"q",         "k",   "v",   "past_key",       "past_value",      "start",
                              "positions", "cos", "sin", "past_key_scale", "past_value_scale"};
const char* const kOutputs[] = {"attention", "present_key", "present_value", "present_key_scale",
                                "present_value_scale"};

std::size_t inputs_of(CacheType type) { return type == CacheType::i8 ? 11 : 9; }
std::size_t outputs_of(CacheType type) { return type == CacheType::i8 ? 5 : 3; }

ONNXTensorElementDataType element(CacheType type, std::size_t input) {
    if (input == 5 || input == 6) return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    if (input != 3 && input != 4) return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    return type == CacheType::i8    ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8
           : type == CacheType::f16 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16
                                    : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
}

std::vector<std::int64_t> shape_of(const Problem& p, std::size_t input) {
    const Shape& s = p.shape;
    switch (input) {
        case 0:
            return {1, s.rows, s.heads * s.size};
        case 1:
        case 2:
            return {1, s.rows, s.kv_heads * s.size};
        case 3:
        case 4:
            return {1, s.kv_heads, p.capacity, s.size};
        case 5:
            return {1};
        case 6:
            return {s.rows};
        case 7:
        case 8:
            return {p.table_rows, s.size / 2};
        default:
            return {1, s.kv_heads, p.capacity};
    }
}

// A session with one node of the operator.
OrtSession* session_of(const Problem& p, int threads) {
    const std::size_t like[] = {0, 3, 4, 9, 10};
    std::vector<Port> in, out;
    for (std::size_t i = 0; i < inputs_of(p.type); i++) in.push_back({kNames[i], element(p.type, i), shape_of(p, i)});
    for (std::size_t i = 0; i < outputs_of(p.type); i++) {
        out.push_back({kOutputs[i], element(p.type, like[i]), shape_of(p, like[i])});
    }
    const char* name = p.type == CacheType::i8    ? "KvAttentionInt8"
                       : p.type == CacheType::f16 ? "KvAttentionHalf"
                                                  : "KvAttention";
    const std::string model =
        one_node_model(name, "penguin", in, out, {{"num_heads", p.shape.heads}, {"kv_num_heads", p.shape.kv_heads}});
    OrtSessionOptions* options = nullptr;
    OrtSession* session = nullptr;
    must(api->CreateSessionOptions(&options));
    must(api->SetIntraOpNumThreads(options, threads));
    must(api->RegisterCustomOpsLibrary_V2(options, operators.c_str()));
    must(api->CreateSessionFromArray(env, model.data(), model.size(), options, &session));
    api->ReleaseSessionOptions(options);
    return session;
}

// One run of a session over a problem's buffers. Presents are the pasts themselves, or buffers of their own in `apart`.
std::string run(OrtSession* session, Problem& p, Problem* apart) {
    OrtMemoryInfo* memory = nullptr;
    must(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
    std::int64_t start = p.shape.start;
    const auto buffers = [&](Problem& of) {
        return std::vector<std::pair<void*, std::size_t>>{{of.q.data(), of.q.size() * 4},
                                                          {of.k.data(), of.k.size() * 4},
                                                          {of.v.data(), of.v.size() * 4},
                                                          {of.keys.data(), of.keys.size()},
                                                          {of.values.data(), of.values.size()},
                                                          {&start, 8},
                                                          {of.positions.data(), of.positions.size() * 8},
                                                          {of.cos.data(), of.cos.size() * 4},
                                                          {of.sin.data(), of.sin.size() * 4},
                                                          {of.key_scales.data(), of.key_scales.size() * 4},
                                                          {of.value_scales.data(), of.value_scales.size() * 4}};
    };
    const auto value = [&](std::pair<void*, std::size_t> buffer, std::size_t input) {
        const std::vector<std::int64_t> shape = shape_of(p, input);
        OrtValue* made = nullptr;
        must(api->CreateTensorWithDataAsOrtValue(memory, buffer.first, buffer.second, shape.data(), shape.size(),
                                                 element(p.type, input), &made));
        return made;
    };
    std::vector<OrtValue*> in, out;
    for (std::size_t i = 0; i < inputs_of(p.type); i++) in.push_back(value(buffers(p)[i], i));
    Problem& to = apart ? *apart : p;
    out.push_back(value({to.out.data(), to.out.size() * 4}, 0));
    for (std::size_t i = 1; i < outputs_of(p.type); i++) {
        const std::size_t input = i < 3 ? 2 + i : 6 + i;
        out.push_back(apart ? value(buffers(*apart)[input], input) : in[input]);
    }
    const std::string sentence =
        said(api->Run(session, nullptr, kNames, in.data(), in.size(), kOutputs, out.size(), out.data()));
    for (OrtValue* each : in) api->ReleaseValue(each);
    for (std::size_t i = 0; i < (apart ? out.size() : 1); i++) api->ReleaseValue(out[i]);
    api->ReleaseMemoryInfo(memory);
    return sentence;
}

const Shape kShapes[] = {{.rows = 1, .start = 600, .heads = 8, .kv_heads = 2, .size = 64},
                         {.rows = 40, .start = 5},
                         {.rows = 0, .start = 4}};

TEST(a_session_gives_what_the_kernel_gives) {
    for (const CacheType type : kTypes) {
        for (const Shape& shape : kShapes) {
            Problem plain(shape, type, 51), shared(shape, type, 51), apart(shape, type, 51), copied(shape, type, 99);
            CHECK(kv_attention(plain.call(), kernels_of(chosen_isa().isa, shape.size), serial()).ok());
            OrtSession* session = session_of(shared, 3);
            CHECK(run(session, shared, nullptr).empty());
            CHECK(shared.out == plain.out && shared.keys == plain.keys && shared.values == plain.values);
            const std::vector<unsigned char> before = apart.keys;
            CHECK(run(session, apart, &copied).empty());
            CHECK(copied.out == plain.out && copied.keys == plain.keys && copied.values == plain.values &&
                  apart.keys == before);
            if (type == CacheType::i8)
                CHECK(!std::memcmp(copied.key_scales.data(), plain.key_scales.data(), plain.key_scales.size() * 4));
            api->ReleaseSession(session);
        }
    }
}

TEST(threads_share_a_session) {
    const Shape shape = kShapes[0];
    Problem plain(shape, CacheType::i8, 52);
    CHECK(plain.run(chosen_isa().isa).ok());
    OrtSession* session = session_of(plain, 2);
    std::vector<std::thread> callers;
    std::vector<int> right(4, 0);
    for (std::size_t caller = 0; caller < right.size(); caller++) {
        callers.emplace_back([&, caller] {
            for (int i = 0; i < 8; i++) {
                Problem own(shape, CacheType::i8, 52);
                right[caller] += run(session, own, nullptr).empty() && own.out == plain.out;
            }
        });
    }
    for (std::thread& each : callers) each.join();
    CHECK(right == std::vector<int>(4, 8));
    api->ReleaseSession(session);
}

TEST(refusals_are_sentences) {
    Problem problem({.rows = 2, .start = 3, .spare = 0}, CacheType::f32, 53);
    OrtSession* session = session_of(problem, 1);
    problem.shape.start = 4;
    CHECK(run(session, problem, nullptr).find("penguin::KvAttention: got 2 rows from slot 4 on, wanted slots 0 to 4") !=
          std::string::npos);
    problem.shape.start = 3, problem.positions[1] = problem.table_rows;
    CHECK(run(session, problem, nullptr).find("got position 45 for row 1, wanted one from 0 to 44") !=
          std::string::npos);
    api->ReleaseSession(session);
}

TEST(an_older_library_is_refused_by_its_version) {
    using Register = OrtStatus* (*)(OrtSessionOptions*, const OrtApiBase*);
    void* library = dlopen(operators.c_str(), RTLD_NOW | RTLD_LOCAL);
    CHECK(library);
    const auto entry = reinterpret_cast<Register>(dlsym(library, "RegisterCustomOps"));
    static const OrtApi* the_api = api;
    const OrtApiBase old{
        [](std::uint32_t version) noexcept { return version < kApi ? the_api : static_cast<const OrtApi*>(nullptr); },
        []() noexcept { return "1.23.2"; }};
    CHECK(said(entry(nullptr, &old)) == "penguin: got onnxruntime 1.23.2, wanted 1.24 or newer; install a newer one");
}

}  // namespace

// Loads ONNX Runtime by its full name; false when it is too old.
bool open(const char* onnxruntime, const char* library) {
    void* handle = dlopen(onnxruntime, RTLD_NOW | RTLD_LOCAL);
    if (!handle) return std::printf("%s\n", dlerror()), false;
    const auto base = reinterpret_cast<const OrtApiBase* (*)()>(dlsym(handle, "OrtGetApiBase"));
    api = base ? base()->GetApi(kApi) : nullptr;
    operators = library;
    if (!api) return std::printf("got no API %u from %s\n", kApi, onnxruntime), false;
    must(api->CreateEnv(ORT_LOGGING_LEVEL_FATAL, "test", &env));
    return true;
}

}  // namespace penguin

int main(int argc, char** argv) {
    if (argc < 3 || !penguin::open(argv[1], argv[2])) return 1;
    return testing::run(argc - 2, argv + 2);
}
