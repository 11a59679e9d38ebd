// Memory for the tests: random words of every storage type, arrays between canaries, tensors that know their answer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "reference.hpp"
#include "work.hpp"

namespace sgdcore::test {

inline constexpr DType all_dtypes[] = {DType::float64, DType::float32, DType::float16, DType::bfloat16};

/// All triples of storage types.
std::vector<DTypes> all_triples();

/// A small generator of random bits: the same numbers in every run and with every standard library.
class Random {
  public:
    explicit Random(std::uint64_t seed) : state_(seed) {}
    std::uint64_t bits();
    /// In [0, bound).
    std::int64_t below(std::int64_t bound) {
        return static_cast<std::int64_t>(bits() % static_cast<std::uint64_t>(bound));
    }

  private:
    std::uint64_t state_;
};

/// Writes `size` random words: mostly numbers of either sign around one with all fraction bits in use, so that every
/// operation rounds; here and there any word at all, or a special one (zero, subnormal, largest, infinite, NaN).
void fill(DType dtype, std::byte* base, std::int64_t size, Random& random);

/// The special words among them: both signs of zero, the smallest and largest subnormal and normal numbers, one,
/// infinity, quiet and signalling NaNs.
std::vector<Word> special_words(DType dtype);

/// The words around which NaN payloads hide: a signalling NaN with only its lowest bit set.
Word signalling_nan(DType dtype);

inline constexpr std::byte canary{0xc5};

/// Where an array lies: on a cache line; with its last byte right before a page that faults; at an odd address.
enum class Placement { aligned, page_end, odd };
inline constexpr Placement all_placements[] = {Placement::aligned, Placement::page_end, Placement::odd};

/// Memory for one array at a time. What is read behind it faults at once or is garbage, what is written around it is
/// noticed by `intact`.
class GuardedArray {
  public:
    explicit GuardedArray(std::size_t capacity);
    ~GuardedArray();
    GuardedArray(const GuardedArray&) = delete;
    GuardedArray& operator=(const GuardedArray&) = delete;

    /// `size` bytes; an odd placement lies `odd` bytes before the end. Ends the life of the array before.
    std::byte* place(std::size_t size, Placement placement, std::size_t odd = 1);
    bool intact() const;

    /// An address where every access faults.
    std::byte* forbidden() const { return end_; }

  private:
    static constexpr std::size_t margin = 64;
    std::byte *mapping_, *end_;  // the usable part ends at end_
    std::size_t length_;
    std::byte *first_ = nullptr, *last_ = nullptr;
};

/// A contiguous tensor of a work list: its arrays at chosen offsets from a cache line, with canaries around, and what
/// they should contain.
class TestTensor {
  public:
    TestTensor(DTypes dtypes, std::int64_t size, std::uint32_t hyper, bool first, Random& random,
               std::size_t offset = 0);

    TensorRef ref();
    /// Takes the step that `sgdcore::step` should take.
    void expect_step(std::span<const SgdHyper> hypers, const StepOptions& options = {});
    /// Makes the next step an ordinary one, as the owner of a momentum buffer does after the first.
    void initialized() { first_ = false; }
    /// Compares all three arrays, canaries included; reports differences as failures of the running test.
    void check(const std::string& context) const;
    /// Puts the arrays, and what they should contain, back to their first contents.
    void reset();
    /// True if the arrays hold the same bytes.
    bool same_bytes(const TestTensor& other) const;

  private:
    struct Array {
        Array(DType dtype, std::int64_t size, std::size_t offset, Random& random);
        std::byte* data() { return bytes.data() + begin; }
        const std::byte* data() const { return bytes.data() + begin; }

        DType dtype;
        std::size_t begin;
        std::vector<std::byte> bytes, original;
        std::vector<Word> expected, original_expected;
    };
    void check_array(const Array& array, const char* name, const std::string& context) const;

    DTypes dtypes_;
    std::int64_t size_;
    std::uint32_t hyper_;
    bool first_, originally_first_;
    Array param_, grad_, momentum_;
};

/// Steps the tensors with the core; the reference is not run.
void step_all(std::span<TestTensor> tensors, std::span<const SgdHyper> hypers, const StepOptions& options = {});

}  // namespace sgdcore::test
