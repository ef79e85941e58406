// The entry point that ONNX Runtime calls when it loads this library.
#include <deque>
#include <mutex>

#include "kv_attention_op.h"
#include "penguin_ops.h"

namespace penguin::ort {
namespace {

// The operators of one copy of ONNX Runtime. A process may have several copies, each with its own table of functions.
struct Domain {
    explicit Domain(const OrtApi& of) : api(of), ops{{of, CacheType::f32}, {of, CacheType::f16}, {of, CacheType::i8}} {
        check(api.CreateCustomOpDomain("penguin", &domain));
        for (const KvAttentionOp& op : ops) check(api.CustomOpDomain_Add(domain, &op));
    }
    const OrtApi& api;
    KvAttentionOp ops[3];
    OrtCustomOpDomain* domain = nullptr;
};

// Domains are kept to the end of the process, because sessions point at them.
Domain& domain_of(const OrtApi& api) {
    static std::mutex mutex;
    static std::deque<Domain>& domains = *new std::deque<Domain>;
    const std::lock_guard lock(mutex);
    for (Domain& known : domains) {
        if (&known.api == &api) return known;
    }
    return domains.emplace_back(api);
}

}  // namespace
}  // namespace penguin::ort

extern "C" PENGUIN_OPS_EXPORT OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options,
                                                                        const OrtApiBase* base) {
    using namespace penguin::ort;
    const OrtApi* api = base->GetApi(kApiVersion);
    if (!api) {
        const std::string sentence = std::string("penguin: got onnxruntime ") + base->GetVersionString() +
                                     ", wanted 1." + std::to_string(kApiVersion) + " or newer; install a newer one";
        return base->GetApi(1)->CreateStatus(ORT_FAIL, sentence.c_str());
    }
    return guarded(*api, [&] { check(api->AddCustomOpDomain(options, domain_of(*api).domain)); });
}
