// Threads, seen from outside: how many there are, steps from several threads at once, steps in a forked child.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "check.hpp"
#include "cpu/threads.hpp"
#include "data.hpp"
#include "step.hpp"

namespace sgdcore::test {
namespace {

constexpr DTypes float32{DType::float32, DType::float32, DType::float32};
constexpr DTypes mixed{DType::bfloat16, DType::float16, DType::float64};
const std::vector<SgdHyper> hypers{{.lr = 0.1, .momentum = 0.9, .nesterov = true}, {.lr = 0.1, .weight_decay = 0.1}};

/// Enough work for several threads, in tensors that no slice respects.
std::vector<TestTensor> model(std::uint64_t seed) {
    Random random(seed);
    std::vector<TestTensor> tensors;
    tensors.emplace_back(float32, 5, 0, true, random);
    tensors.emplace_back(float32, 100'003, 0, true, random);
    tensors.emplace_back(mixed, 30'001, 1, false, random);
    tensors.emplace_back(mixed, 2'000, 0, true, random);
    return tensors;
}

void step_and_expect(std::vector<TestTensor>& tensors) {
    step_all(tensors, hypers);
    for (TestTensor& tensor : tensors) {
        tensor.expect_step(hypers);
        tensor.initialized();
    }
}

void check_all(const std::vector<TestTensor>& tensors, const std::string& context) {
    for (const TestTensor& tensor : tensors) tensor.check(context);
}

struct Calls {
    std::atomic<int> total = 0, count = 0;
    std::atomic<int> by_thread[16] = {};
};

void note_call(void* context, int thread, int count) {
    Calls& calls = *static_cast<Calls*>(context);
    ++calls.total;
    calls.count = count;
    if (thread >= 0 && thread < 16) ++calls.by_thread[thread];
}

}  // namespace

TEST(threads, each_thread_of_a_region_is_called_once) {
    for (const int wanted : {-1, 0, 1, 2, 3, 7}) {
        Calls calls;
        cpu::run_parallel(wanted, note_call, &calls);
        const int count = calls.count;
        CHECK(count == (wanted < 1 ? 1 : wanted), std::to_string(count) + " threads, wanted " + std::to_string(wanted));
        CHECK(calls.total == count);
        for (int thread = 0; thread < count; ++thread) CHECK(calls.by_thread[thread] == 1, std::to_string(thread));
    }
}

TEST(threads, the_number_can_be_chosen_and_given_back) {
    const int before = cpu::num_threads();
    CHECK(before >= 1);
    if (const char* from_environment = std::getenv("OMP_NUM_THREADS")) {
        CHECK(before == std::atoi(from_environment), std::to_string(before));
    }
    cpu::set_num_threads(5);
    CHECK(cpu::num_threads() == 5);
    cpu::set_num_threads(0);
    CHECK(cpu::num_threads() == before);
}

TEST(threads, several_threads_step_different_tensors_at_once) {
    // Each opens parallel regions of its own; together they must neither mix up their work nor wait for each other.
    constexpr int steps = reduced ? 3 : 10;
    cpu::set_num_threads(2);
    std::vector<std::vector<TestTensor>> models;
    for (std::uint64_t i = 0; i < 4; ++i) models.push_back(model(20 + i));
    std::atomic<int> waiting = static_cast<int>(models.size());
    std::vector<std::thread> threads;
    for (std::vector<TestTensor>& tensors : models) {
        threads.emplace_back([&tensors, &waiting] {
            --waiting;
            while (waiting > 0) std::this_thread::yield();
            for (int i = 0; i < steps; ++i) step_and_expect(tensors);
        });
    }
    for (std::thread& thread : threads) thread.join();
    for (const std::vector<TestTensor>& tensors : models) check_all(tensors, "concurrent steps");
    cpu::set_num_threads(0);
}

TEST(threads, the_number_may_change_while_others_step) {
    constexpr int steps = reduced ? 5 : 20;
    std::vector<TestTensor> tensors = model(30);
    std::atomic<bool> done = false;
    std::thread other([&] {
        for (int count = 0; !done; count = (count + 1) % 4) {
            cpu::set_num_threads(count);
            std::this_thread::yield();
        }
    });
    for (int i = 0; i < steps; ++i) step_and_expect(tensors);
    done = true;
    other.join();
    check_all(tensors, "changing the number of threads");
    cpu::set_num_threads(0);
}

// A group of its own, because a forked child of a process with many threads is what it is about.
TEST(fork, a_child_trains_and_exits) {
    cpu::set_num_threads(4);
    std::vector<TestTensor> tensors = model(40);
    step_and_expect(tensors);  // now OpenMP has a pool, which the child will not have
    std::vector<TestTensor> stepped = tensors;
    step_and_expect(stepped);
    const pid_t child = fork();
    if (child == 0) {
        // Only the exit status comes back.
        step_all(tensors, hypers);
        bool right = cpu::num_threads() == 1;
        for (std::size_t i = 0; i < tensors.size(); ++i) right = right && tensors[i].same_bytes(stepped[i]);
        for (int i = 0; i < 3; ++i) step_all(tensors, hypers);
        _exit(right ? 0 : 1);
    }
    CHECK(child > 0);
    if (child <= 0) return;
    int status = -1;
    pid_t ended = 0;
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (ended == 0 && std::chrono::steady_clock::now() < deadline) {
        ended = waitpid(child, &status, WNOHANG);
        if (ended == 0) std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    if (ended == 0) {
        kill(child, SIGKILL);
        waitpid(child, &status, 0);
    }
    CHECK(ended == child, "the child hangs");
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child ended with status " + std::to_string(status));
    // The parent goes on as before.
    step_and_expect(tensors);
    check_all(tensors, "after fork");
    CHECK(cpu::num_threads() == 4);
    cpu::set_num_threads(0);
}

}  // namespace sgdcore::test
