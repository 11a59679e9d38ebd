// The caller's floating-point mode: every thread of a step computes in it, and has its own again afterwards.
#include <algorithm>
#include <atomic>
#include <string>
#include <thread>
#include <vector>

#include "check.hpp"
#include "cpu/memory_pass.hpp"
#include "cpu/threads.hpp"
#include "data.hpp"
#include "float_modes.hpp"
#include "step.hpp"

extern "C" void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);

namespace sgdcore::test {
namespace {

constexpr int thread_count = 4;

/// Counts the threads that are in a mode.
struct Census {
    FloatMode wanted;
    std::atomic<int> in_mode = 0, all = 0;
    void count() {
        ++all;
        if (FloatMode::current() == wanted) ++in_mode;
    }
    std::string text() const { return std::to_string(in_mode) + " of " + std::to_string(all) + " threads"; }
};

/// How many threads of a region are in `wanted` while sgdcore's own code runs in them.
void check_region(FloatMode wanted, const std::string& context) {
    Census census{wanted};
    cpu::run_parallel(thread_count, [](void* data, int, int) { static_cast<Census*>(data)->count(); }, &census);
    CHECK(census.all == thread_count && census.in_mode == thread_count, census.text() + ": " + context);
}

/// How many threads of the pool are in `wanted` by themselves.
void check_pool([[maybe_unused]] FloatMode wanted, [[maybe_unused]] int expected,
                [[maybe_unused]] const std::string& context) {
#if !defined(SGDCORE_THREAD_SANITIZER)  // it would not see that the region starts after what came before
    Census census{wanted};
    GOMP_parallel([](void* data) { static_cast<Census*>(data)->count(); }, &census, thread_count, 0);
    CHECK(census.all == thread_count && census.in_mode == expected, census.text() + ": " + context);
#endif
}

/// Calls `body` in a thread of its own. OpenMP gives it a pool of its own, made in the mode it is in by then.
template <class Body>
void in_new_thread(Body body) {
    std::thread(body).join();
}

const std::vector<SgdHyper> hypers{{.lr = 0.3, .momentum = 0.9, .dampening = 0.1, .weight_decay = 0.01},
                                   {.lr = 0.3, .momentum = 0.7, .nesterov = true}};

/// Tensors of all storage types and odd lengths whose updates round and whose results are subnormal here and there.
std::vector<TestTensor> model() {
    Random random(50);
    std::vector<TestTensor> tensors;
    std::size_t offset = 0;
    for (const DTypes& dtypes : all_triples()) {
        tensors.emplace_back(dtypes, reduced ? 1'501 : 5'003, offset % 2, false, random, offset % 5 * 2);
        ++offset;
    }
    return tensors;
}

/// A tensor of float16 numbers, most of them near the smallest, where a conversion itself may round.
struct SmallFloat16 {
    static constexpr std::size_t size = 200'003;
    std::vector<std::uint16_t> param, grad;
    explicit SmallFloat16(std::uint64_t seed) : param(size), grad(size) {
        Random random(seed);
        for (std::uint16_t& word : param) word = static_cast<std::uint16_t>(random.bits() & 0x87ff);
        for (std::uint16_t& word : grad) word = static_cast<std::uint16_t>(random.bits() & 0x87ff);
    }
    void step() {
        TensorRef tensor{.param = reinterpret_cast<std::byte*>(param.data() + 1),
                         .grad = reinterpret_cast<std::byte*>(grad.data()),
                         .size = size - 1};
        tensor.param_dtype = tensor.grad_dtype = DType::float16;
        const SgdHyper hyper{.lr = 0.37};
        test::step({&tensor, 1}, {&hyper, 1}, {});
    }
};

}  // namespace

TEST(float_mode, a_regions_threads_are_in_the_callers_mode) {
    check_region(FloatMode::current(), "the pool is made here");
    for (const CallersMode& mode : all_modes) {
        const ModeForScope scope(mode);
        check_region(FloatMode::current(), "the caller changed its mode after the pool was made, " + mode.text());
    }
    check_region(FloatMode::standard(), "the caller went back");
    check_pool(FloatMode::standard(), thread_count, "afterwards, outside");
}

TEST(float_mode, a_pool_may_be_made_in_another_mode) {
    for (const CallersMode& mode : all_modes) {
        in_new_thread([&] {
            enter(mode);
            const FloatMode first = FloatMode::current();
            check_region(first, "the pool is made in " + mode.text());
            FloatMode::standard().apply();
            check_region(FloatMode::standard(), "the caller went back from " + mode.text());
            if (first != FloatMode::standard()) {
                check_pool(first, thread_count - 1, "the pool's threads keep their own, " + mode.text());
            }
        });
    }
}

TEST(float_mode, subnormal_numbers_are_kept_or_flushed_as_the_caller_says) {
    // The words are float32's number 1e-41 and zero.
    constexpr std::uint32_t tiny = 7136;
    cpu::set_num_threads(thread_count);
    for (const bool made_flushing : {false, true}) {
        in_new_thread([&] {
            enter({.flush = made_flushing});
            check_region(FloatMode::current(), "the pool is made");
            for (const bool flush : {!made_flushing, made_flushing}) {
                enter({.flush = flush});
                std::vector<std::uint32_t> param(200'001, 0), grad(param.size(), tiny);
                TensorRef tensor{.param = reinterpret_cast<std::byte*>(param.data()),
                                 .grad = reinterpret_cast<std::byte*>(grad.data()),
                                 .size = std::ssize(param)};
                const SgdHyper hyper{.lr = -1};
                step({&tensor, 1}, {&hyper, 1}, {});
                const auto kept = std::ranges::count(param, tiny), zeros = std::ranges::count(param, 0u);
                CHECK((flush ? zeros : kept) == std::ssize(param), std::to_string(kept) + " kept, " +
                                                                       std::to_string(zeros) + " zeros, " +
                                                                       (flush ? "flushing" : "not flushing"));
            }
        });
    }
    cpu::set_num_threads(0);
}

TEST(float_mode, bits_do_not_depend_on_the_thread_count) {
    for (const CallersMode& mode : all_modes) {
        for (const bool zero_grad : {false, true}) {
            std::vector<TestTensor> one = model();
            cpu::set_num_threads(1);
            {
                const ModeForScope scope(mode);
                step_all(one, hypers, {.zero_grad = zero_grad, .grad_factor = zero_grad ? 0.3 : 1});
            }
            for (const int threads : {2, 3, 7}) {
                std::vector<TestTensor> several = model();
                cpu::set_num_threads(threads);
                {
                    const ModeForScope scope(mode);
                    step_all(several, hypers, {.zero_grad = zero_grad, .grad_factor = zero_grad ? 0.3 : 1});
                }
                for (std::size_t i = 0; i < one.size(); ++i) {
                    CHECK(several[i].same_bytes(one[i]),
                          "tensor " + std::to_string(i) + ", " + std::to_string(threads) + " threads, " + mode.text());
                }
            }
        }
    }
    cpu::set_num_threads(0);
}

TEST(float_mode, float16_rounds_alike_wherever_a_slice_ends) {
    for (const CallersMode& mode : all_modes) {
        SmallFloat16 one(60);
        cpu::set_num_threads(1);
        {
            const ModeForScope scope(mode);
            one.step();
        }
        for (const int threads : {2, 3, 5}) {
            SmallFloat16 several(60);
            cpu::set_num_threads(threads);
            {
                const ModeForScope scope(mode);
                several.step();
            }
            CHECK(several.param == one.param, std::to_string(threads) + " threads, " + mode.text());
        }
    }
    cpu::set_num_threads(0);
}

}  // namespace sgdcore::test
