// Who knows of whose accesses: happens-before, by which data races are found.
//
// An event is (CTA, thread, phase, tick). The phase counts the CTA's full barriers, the tick the thread's releases.
// A thread knows of another CTA all events of phases below a number, and for single threads all events up to a (phase,
// tick). That is exact, and small if CTAs communicate by flags.
#pragma once

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "isa.h"

namespace ptx {

constexpr u16 NOBODY = 0xffff;

struct Event {
  u16 cta = NOBODY, thread = 0;
  u32 phase = 0, tick = 0;
};

// Lanes of a warp that read a cell since its last write.
struct Readers {
  u16 cta = NOBODY, warp = 0;
  u32 lanes = 0, phase = 0, tick = 0, instruction = 0;

  void join(const Readers& other) {
    if (phase != other.phase) {
      *this = other;
      return;
    }
    lanes |= other.lanes;
    tick = std::max(tick, other.tick);
    instruction = other.instruction;
  }
};

struct Cell {
  Event write;
  u32 write_instruction = 0;
  Readers readers;  // of the first warp that read it
  u32 others = 0;   // an index of a list of readers of other warps; 0: there are none
  bool written = false;
};

// Memory that a kernel may touch.
struct Region {
  u64 begin, end;
  int shift;  // log2 of the bytes of a cell
  bool writable;
  std::string name;
  std::vector<u8> holes;  // by cell, whether it belongs to nobody; empty: none does
  std::vector<Cell> cells;
  u64 traffic[4] = {};  // bytes loaded and stored, and sectors: runtime.h, count_traffic

  // The first cell and the last of an access.
  std::pair<u64, u64> span(u64 address, u32 size) {
    if (cells.empty()) cells.resize(((end - begin) >> shift) + 1);
    return {(address - begin) >> shift, (address + size - 1 - begin) >> shift};
  }
};

struct Knowledge {
  std::vector<u32> below;      // by CTA: all its events of phases below this one
  std::vector<Event> threads;  // of these threads all events up to this one

  bool covers(const Event& e) const {
    if (e.cta < below.size() && below[e.cta] > e.phase) return true;
    for (auto& t : threads)
      if (t.cta == e.cta && t.thread == e.thread)
        return t.phase > e.phase || (t.phase == e.phase && t.tick >= e.tick);
    return false;
  }
  void add(const Event& e) {
    if (e.cta < below.size() && below[e.cta] > e.phase) return;
    for (auto& t : threads)
      if (t.cta == e.cta && t.thread == e.thread) {
        if (e.phase > t.phase || (e.phase == t.phase && e.tick > t.tick)) t = e;
        return;
      }
    threads.push_back(e);
  }
  void raise(u16 cta, u32 phase) {
    if (below.size() <= cta) below.resize(cta + 1);
    if (phase <= below[cta]) return;
    below[cta] = phase;
    forget([&](const Event& t) { return t.cta == cta && t.phase < phase; });
  }
  void join(const Knowledge& other) {
    for (size_t cta = 0; cta < other.below.size(); ++cta)
      if (other.below[cta]) raise(u16(cta), other.below[cta]);
    for (auto& t : other.threads) add(t);
  }
  template <class F>
  void forget(F which) {
    threads.erase(std::remove_if(threads.begin(), threads.end(), which), threads.end());
  }
};

struct Thread {
  Knowledge extra;                    // beyond what its CTA knew at the last full barrier
  Knowledge pending;                  // what relaxed reads saw, and a fence makes known
  std::unique_ptr<Knowledge> fenced;  // what it knew at its last fence
  u32 tick = 0;
};

}  // namespace ptx
