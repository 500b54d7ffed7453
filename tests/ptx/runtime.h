// The machine: runs the CTAs of a launch on the CPU and reports what a GPU would not forgive. emulator.py calls it.
//
// A warp runs an instruction for its 32 lanes at once. Lanes that branch apart become fragments. The fragment at the
// lowest instruction goes first, so that fragments meet again; an instruction that says .sync waits until one fragment
// holds all lanes that it names. A seeded scheduler lets CTAs and warps take turns at memory operations.
//
// Not modelled: caches and reordered memory operations (a race is reported instead), and fences of CTA scope.
#pragma once

#include <limits>
#include <unordered_map>

#include "arithmetic.h"
#include "races.h"

namespace ptx {

enum Kind : u8 {  // emulator.py, KINDS
  OUT_OF_BOUNDS,
  MISALIGNED,
  READ_ONLY,
  RACE,
  RACE_SAME_VALUE,
  RACE_OF_READ,
  UNINITIALISED,
  DEADLOCK,
  DIVERGED,
  TRAP,
  TOO_LONG
};
enum Policy : i32 { IN_ORDER, BY_CHANCE, PRIORITIES };

struct Fragment {
  i32 pc;
  u32 mask;
  int barrier = -1;  // at which it waits
};
struct Warp {
  std::vector<u8> registers;
  std::vector<Fragment> fragments;
  bool waiting = false;  // all fragments wait at barriers
};
struct Cta {
  u16 id;
  u32 index[3];
  u32 phase = 0;
  Knowledge known;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<u8> shared, local;
  Region shadow;  // of the shared memory
  int alive = 0;  // threads
  u64 spins = 0;  // strong accesses that changed nothing, since anything changed
  i64 priority = 0;
};

struct Finding {
  u8 kind;
  i32 instruction, other;
  u16 cta, thread, other_cta, other_thread;
  std::string where;
  u64 count;
};

struct Kernel {
  std::vector<Instruction> code;
  std::vector<u8> constants;
  int registers = 0, shared = 0, local = 0;  // bytes; of a warp, of a CTA, of a thread
  int shared_shift = 1;                      // log2 of the bytes of a cell of shared memory
};

constexpr u8 GARBAGE = 0xA5;  // in what was never written
constexpr u64 SECTOR = 32;    // bytes of memory that move together

class Machine : Arithmetic {
 public:
  std::vector<std::unique_ptr<Region>> regions;
  std::vector<Finding> findings;
  std::vector<u64> executed, lanes_executed;  // by instruction
  u64 instructions = 0, switches = 0, accesses = 0;

  void launch(const Kernel& code, const Options& options, const u8* arguments) {
    kernel = &code, opt = &options, parameters = arguments;
    jitter = options.jitter;
    constants = code.constants.data();
    random = options.seed * 0x9E3779B97F4A7C15ull | 1;
    for (int i = 0; i < 8; ++i) chance();
    std::sort(regions.begin(), regions.end(), [](auto& a, auto& b) { return a->begin < b->begin; });
    executed.assign(code.code.size(), 0);
    lanes_executed.assign(code.code.size(), 0);
    more_readers.assign(1, {});
    ctas = options.grid[0] * options.grid[1] * options.grid[2];
    warps = (options.block[0] * options.block[1] * options.block[2] + LANES - 1) / LANES;
    std::vector<u32> order(ctas);
    for (u32 i = 0; i < ctas; ++i) order[i] = i;
    if (options.policy != IN_ORDER && chance() & 1)
      for (u32 i = ctas; i > 1; --i) std::swap(order[i - 1], order[chance() % i]);
    patience = 16ull << chance() % 12;
    stall_at = 1ull << chance() % 10;
    u32 started = 0;
    while (!stop) {
      for (; started < ctas && resident.size() < size_t(options.resident); progress()) start(order[started++]);
      if (resident.empty()) break;
      if (Cta* chosen = choose()) turn(chosen);
      for (size_t i = 0; i < resident.size();) {
        if (resident[i]->alive) ++i;
        else resident.erase(resident.begin() + i), progress();
      }
    }
  }

 private:
  const Kernel* kernel = nullptr;
  const Options* opt = nullptr;
  const u8* parameters = nullptr;
  u64 random = 1;
  u32 ctas = 0, warps = 0;  // of the grid, of a CTA
  std::vector<std::unique_ptr<Cta>> resident;
  // The accesses that a thread knows to be over once it acquires from an address.
  std::unordered_map<u64, Knowledge> messages;
  std::vector<std::vector<Readers>> more_readers;
  Region* last_region = nullptr;
  // The CTA, warp and instruction that run now.
  Cta* c = nullptr;
  Warp* w = nullptr;
  int warp = 0;
  u32 pc = 0;
  i64 budget = 0;  // memory operations that are left of the warp's turn
  bool stop = false;
  // The scheduler's state.
  u64 turns = 0, stall_at = 0, stalled_until = 0, patience = 64;
  u32 stalled = ~0u;

  u64 chance() {  // xorshift*; its upper bits are the better ones
    random ^= random >> 12;
    random ^= random << 25;
    random ^= random >> 27;
    u64 bits = random * 0x2545F4914F6CDD1Dull;
    return bits ^ bits >> 32;
  }

  // Scheduling.

  void start(u32 id) {
    auto cta = std::make_unique<Cta>();
    cta->id = u16(id);
    cta->index[0] = id % opt->grid[0];
    cta->index[1] = id / opt->grid[0] % opt->grid[1];
    cta->index[2] = id / opt->grid[0] / opt->grid[1];
    int threads = int(opt->block[0] * opt->block[1] * opt->block[2]);
    cta->alive = threads;
    cta->threads.resize(threads);
    cta->known.below.assign(ctas, 0);
    cta->warps.resize(warps);
    for (u32 i = 0; i < warps; ++i) {
      int rest = threads - int(i) * LANES;
      cta->warps[i].registers.assign(kernel->registers, GARBAGE);
      cta->warps[i].fragments.push_back({0, rest >= LANES ? ALL : (1u << rest) - 1});
    }
    cta->shared.assign(kernel->shared + opt->dynamic_shared, GARBAGE);
    cta->local.assign(size_t(kernel->local) * threads, GARBAGE);
    cta->shadow = {0, cta->shared.size(), kernel->shared_shift, true, "shared memory", {}, {}};
    cta->priority = i64(chance() >> 2);
    resident.push_back(std::move(cta));
  }

  void progress() {
    for (auto& r : resident) r->spins = 0;
  }

  // The CTA whose turn it is; null after a deadlock.
  Cta* choose() {
    constexpr u64 SPINNING = 12, HOPELESS = 400;
    bool hopeless = true;
    std::vector<Cta*> ready;
    for (auto& r : resident) {
      bool can = false;
      for (auto& x : r->warps) can |= !x.fragments.empty() && !x.waiting;
      if (!can) continue;
      ready.push_back(r.get());
      hopeless &= r->spins > HOPELESS * warps;
    }
    if (hopeless) {  // also if none is ready
      for (auto& r : resident) {
        c = r.get();
        for (warp = 0; warp < int(warps); ++warp)
          for (auto& f : c->warps[warp].fragments) report(DEADLOCK, f, ready.empty() ? "at a barrier" : "spinning");
      }
      stop = true;
      return nullptr;
    }
    auto any = [&](auto& from) { return from[chance() % from.size()]; };
    if (opt->policy == IN_ORDER) {
      Cta* chosen = ready[0];
      for (auto* r : ready)
        if (r->spins < chosen->spins) return r;
      return chosen;
    }
    if (opt->policy == PRIORITIES) {  // the highest that does not spin; now and then it gets another priority
      Cta* chosen = ready[0];
      auto rank = [](Cta* r) { return std::make_pair(r->spins < SPINNING, r->priority); };
      for (auto* r : ready)
        if (rank(r) > rank(chosen)) chosen = r;
      if (chosen->spins >= SPINNING) chosen = any(ready);
      if (chance() % patience == 0) chosen->priority = i64(chance() >> 2);
      return chosen;
    }
    // By chance. Now and then a CTA is held, for long or for short: early more likely than late.
    if (++turns == stall_at) {
      stalled = any(ready)->id;
      stalled_until = turns + (1ull << chance() % 18);
      stall_at = turns * 2 + chance() % 64;
    }
    std::vector<Cta*> free;
    bool all_spin = true;
    for (auto* r : ready)
      if (r->id != stalled || turns >= stalled_until) {
        free.push_back(r);
        all_spin &= r->spins >= SPINNING * warps;
      }
    return all_spin ? any(ready) : any(free);
  }

  void turn(Cta* chosen) {
    std::vector<int> ready;
    for (u32 i = 0; i < warps; ++i)
      if (!chosen->warps[i].fragments.empty() && !chosen->warps[i].waiting) ready.push_back(int(i));
    warp = ready[opt->policy == IN_ORDER ? 0 : chance() % ready.size()];
    c = chosen;
    w = &c->warps[warp];
    registers = w->registers.data();
    constexpr i64 BUDGETS[] = {1, 8, 64, 400};
    budget = opt->policy == IN_ORDER ? 1 << 30 : BUDGETS[chance() % 4];
    ++switches;
    while (!stop) {
      int which = pick();
      if (which < 0 || !advance(size_t(which))) return;
    }
  }

  // The fragment of the warp that runs next; -1 if none can.
  int pick() {
    auto& fs = w->fragments;
    if (fs.empty()) return -1;
    for (size_t i = 0; i < fs.size(); ++i)  // fragments that have met are one
      for (size_t j = i + 1; j < fs.size();) {
        if (fs[i].pc != fs[j].pc || fs[i].barrier != fs[j].barrier) ++j;
        else fs[i].mask |= fs[j].mask, fs.erase(fs.begin() + j);
      }
    auto can = [&](const Fragment& f) { return f.barrier < 0 && !lacks(f); };
    int chosen = -1;
    for (size_t i = 0; i < fs.size(); ++i)
      if (can(fs[i]) && (chosen < 0 || fs[i].pc < fs[chosen].pc)) chosen = int(i);
    // Now and then another: of two fragments that wait for each other neither may starve.
    if (chosen >= 0 && fs.size() > 1 && chance() % 256 == 0)
      for (size_t i = 0; i < fs.size(); ++i)
        if (can(fs[i]) && chance() & 1) chosen = int(i);
    if (chosen < 0) {
      w->waiting = true;
      for (auto& f : fs)
        if (f.barrier < 0) report(DIVERGED, f, "lanes that it waits for do not come"), stop = true;
    }
    return chosen;
  }

  // Whether lanes are missing for which the fragment's next instruction waits.
  bool lacks(const Fragment& f) {
    if (f.mask == ALL) return false;
    const Instruction& i = kernel->code[f.pc];
    auto named = [&](int operand) { return source<u32>(i.r[operand])[__builtin_ctz(f.mask)]; };
    u32 need = 0;
    switch (i.op) {
      case O_shfl: need = named(5); break;
      case O_vote: case O_redux: case O_elect: case O_match_any: need = named(3); break;
      case O_bar_warp: need = named(0); break;
      case O_ldmatrix: need = ALL; break;
      default: return false;
    }
    return i.guard == NONE && need & ~f.mask;
  }

  u32 guarded(const Instruction& i, u32 mask) {
    if (i.guard == NONE) return mask;
    u32 p = *source<u32>(i.guard);
    return mask & (i.flags & NEGATED_GUARD ? ~p : p);
  }

  // Runs a fragment until the warp's turn ends (false), or fragments have to be looked at again.
  bool advance(size_t which) {
    Fragment f = w->fragments[which];
    bool alone = w->fragments.size() == 1;
    auto keep = [&] { w->fragments[which] = f; };
    for (;;) {
      const Instruction& i = kernel->code[f.pc];
      pc = u32(f.pc);
      u32 m = guarded(i, f.mask);
      ++instructions, ++executed[pc], lanes_executed[pc] += __builtin_popcount(m);
      if (instructions > opt->limit) {
        report(TOO_LONG, f, "");
        stop = true;
        return false;
      }
      switch (i.op) {
        case O_bra:
          if (m == f.mask) f.pc = i.target;
          else {
            ++f.pc;
            if (m) {
              f.mask &= ~m;
              keep();
              w->fragments.push_back({i.target, m});
              return true;
            }
          }
          break;
        case O_ret:
          c->alive -= __builtin_popcount(m);
          f.mask &= ~m, ++f.pc;
          if (f.mask) keep();
          else w->fragments.erase(w->fragments.begin() + which);
          open_barriers();
          if (m) return true;
          break;
        case O_bar:
          if (m && m != f.mask && i.variant) {
            report(DIVERGED, f, "a barrier for some lanes");
            stop = true;
            return false;
          }
          if (m) {
            if (m != f.mask) w->fragments.push_back({f.pc + 1, f.mask & ~m});
            f.mask = m;
            f.barrier = int(i.immediate);
            keep();
            return open_barriers() ? budget-- > 0 : true;
          }
          ++f.pc;
          break;
        default:
          ++f.pc;
          if (m) execute(i, m);
          if (stop) return false;
          if (budget <= 0) {
            keep();
            return false;
          }
      }
      if (!alone || lacks(f)) {
        keep();
        return true;
      }
    }
  }

  // Opens the barriers of the CTA at which all threads are that they wait for.
  bool open_barriers() {
    bool opened = false;
    for (int id = 0; id < 16; ++id) {
      int here = 0, expected = c->alive;
      const Instruction* barrier = nullptr;
      for (auto& x : c->warps)
        for (auto& f : x.fragments)
          if (f.barrier == id) here += __builtin_popcount(f.mask), barrier = &kernel->code[f.pc];
      if (barrier && barrier->n) expected = barrier->target;
      if (!here || here < expected) continue;
      bool full = here >= c->alive;
      if (full) {
        for (auto& t : c->threads) {
          c->known.join(t.extra);
          t.extra = Knowledge();
        }
        ++c->phase;
        c->known.forget([&](const Event& t) { return t.cta == c->id; });  // it is below the phase now
      }
      std::vector<int> who;
      for (u32 n = 0; n < warps; ++n) {
        i32 first = -1;  // the instruction at which the warp waits
        for (auto& f : c->warps[n].fragments)
          if (f.barrier == id) {
            if (first >= 0 && f.pc != first && kernel->code[f.pc].variant)
              report(DIVERGED, f.pc, first, 0, {c->id, u16(n * LANES)}, "lanes of a warp at different barriers");
            first = f.pc;
            for (u32 rest = full ? 0 : f.mask; rest; rest &= rest - 1)
              who.push_back(int(n) * LANES + __builtin_ctz(rest));
            f.barrier = -1, ++f.pc;
            c->warps[n].waiting = false;
          }
      }
      if (!full) meet(who);
      opened = true;
    }
    return opened;
  }

  // These threads of the CTA learn what each of them knows and did.
  void meet(const std::vector<int>& who) {
    Knowledge all;
    for (int t : who) {
      all.join(c->threads[t].extra);
      all.add(now(t));
    }
    for (int t : who) {
      c->threads[t].extra = all;
      ++c->threads[t].tick;
    }
  }

  // Findings.

  void report(Kind kind, i32 instruction, i32 other, int l, Event e, const std::string& where) {
    constexpr size_t MOST = 200;
    for (auto& x : findings)
      if (x.kind == kind && x.instruction == instruction && x.other == other) {
        ++x.count;
        return;
      }
    if (findings.size() < MOST)
      findings.push_back({kind, instruction, other, c->id, u16(warp * LANES + l), e.cta, e.thread, where, 1});
  }
  void report(Kind kind, int l, const std::string& where) { report(kind, i32(pc), -1, l, Event(), where); }
  void report(Kind kind, const Fragment& f, const std::string& where) {
    report(kind, f.pc, -1, __builtin_ctz(f.mask), Event(), where);
  }

  // Memory.

  Region* find(u64 address, u64 size) {
    auto holds = [&](Region* r) { return r && address >= r->begin && address + size <= r->end; };
    if (holds(last_region)) return last_region;
    auto at = std::upper_bound(regions.begin(), regions.end(), address, [](u64 a, auto& r) { return a < r->end; });
    return at != regions.end() && holds(at->get()) ? last_region = at->get() : nullptr;
  }

  // Bytes and 32-byte sectors that a warp's access moves: what several lanes access counts once. An access is no longer
  // than a sector and lies in one, since it is aligned.
  void count_traffic(std::pair<u64, Region*>* begin, std::pair<u64, Region*>* end, u32 size, bool writes) {
    std::sort(begin, end);
    u64 last_address = ~0ull, last_sector = ~0ull;
    for (auto access = begin; access != end; ++access) {
      auto [address, region] = *access;
      region->traffic[writes] += address == last_address ? 0 : size;
      region->traffic[2 + writes] += address / SECTOR != last_sector;
      last_address = address, last_sector = address / SECTOR;
    }
  }

  // This process's address of what a lane accesses, or null after a finding. Local memory has no region.
  u8* locate(const Instruction& i, int l, u64 address, u32 size, bool writes, Region*& region) {
    u8 space = i.space;
    if (space == GENERIC) {
      space = address >= LOCAL_WINDOW ? LOCAL : address >= SHARED_WINDOW ? SHARED : GLOBAL;
      address -= space == LOCAL ? LOCAL_WINDOW : space == SHARED ? SHARED_WINDOW : 0;
    }
    region = nullptr;
    if (address % size) {
      report(MISALIGNED, l, place(space, address));
      return nullptr;
    }
    if (space == SHARED) {
      region = &c->shadow;
      address = u32(address);
      if (address + size <= c->shared.size()) return c->shared.data() + address;
    } else if (space == LOCAL) {
      if (address + size <= u64(kernel->local))
        return c->local.data() + size_t(warp * LANES + l) * kernel->local + address;
    } else if ((region = find(address, size))) {
      bool hole = false;
      if (!region->holes.empty()) {
        auto [first, last] = region->span(address, size);
        for (u64 cell = first; cell <= last; ++cell) hole |= region->holes[cell];
      }
      if (!hole && writes && !region->writable) {
        report(READ_ONLY, l, place(space, address));
        return nullptr;
      }
      if (!hole) return reinterpret_cast<u8*>(address);
    }
    report(OUT_OF_BOUNDS, l, place(space, address));
    return nullptr;
  }
  std::string place(u8 space, u64 address) {
    if (space == SHARED) return "shared memory+" + std::to_string(address);
    if (space == LOCAL) return "local memory+" + std::to_string(address);
    Region* nearest = nullptr;
    for (auto& r : regions)
      if (r->begin <= address) nearest = r.get();
    if (!nearest) return "before all tensors";
    std::string text = nearest->name + "+" + std::to_string(address - nearest->begin);
    return address >= nearest->end ? text + " (past its end)" : text;
  }
  // The address of an access, in terms of its region's bounds.
  u64 within(const Region* region, const u8* at) const {
    return region == &c->shadow ? u64(at - c->shared.data()) : reinterpret_cast<u64>(at);
  }

  void addresses(const Instruction& i, u64* a) {
    for (int l = 0; l < LANES; ++l) a[l] = lane(i, 8, l) + u64(i.immediate);
    if (i.r[8] != NONE && i.width[8] == 4)
      for (int l = 0; l < LANES; ++l) a[l] = u32(a[l]);
  }

  void spend(const Instruction& i) {
    ++accesses;
    if (i.space != SHARED && i.space != LOCAL) --budget;
  }

  // Races.

  Event now(int thread) const { return {c->id, u16(thread), c->phase, c->threads[thread].tick}; }

  bool before(const Event& e, int thread) const {
    if (e.cta == c->id && (e.phase < c->phase || e.thread == thread)) return true;
    return c->known.covers(e) || c->threads[thread].extra.covers(e);
  }

  bool strong(u32 at) const { return kernel->code[at].op == O_atom || kernel->code[at].order != WEAK; }
  // Whether an access of another CTA, or this one, and the present one are strong enough for each other.
  bool both_strong(u32 other, u16 cta) const {
    bool reach = kernel->code[other].scope == GPU_SCOPE && kernel->code[pc].scope == GPU_SCOPE;
    return strong(other) && strong(pc) && (cta == c->id || reach);
  }

  // Where several threads hold an element, all load it and one stores it: a race, but of loads that nobody uses. So
  // within a CTA a load that comes after the store gets garbage: then the results tell whether anybody uses it.
  void race(Region* region, u32 other, const Event& e, int l, u64 address, bool same_value, bool of_read) {
    bool spare = of_read && e.cta == c->id && region != &c->shadow && !strong(pc) && !strong(other);
    Kind kind = spare ? RACE_OF_READ : same_value ? RACE_SAME_VALUE : RACE;
    report(kind, i32(pc), i32(other), l, e, region->name + "+" + std::to_string(address - region->begin));
  }

  void check_write(Region* region, u64 address, u32 size, int l, bool same_value) {
    int thread = warp * LANES + l;
    auto [first, last] = region->span(address, size);
    for (u64 i = first; i <= last; ++i) {
      Cell& x = region->cells[i];
      if (x.write.cta != NOBODY && !before(x.write, thread) && !both_strong(x.write_instruction, x.write.cta))
        race(region, x.write_instruction, x.write, l, address, same_value, false);
      check_readers(region, x.readers, thread, l, address, same_value);
      if (x.others) {
        for (auto& r : more_readers[x.others]) check_readers(region, r, thread, l, address, same_value);
        more_readers[x.others].clear();
        x.others = 0;
      }
      x.readers.lanes = 0;
      x.write = now(thread), x.write_instruction = pc, x.written = true;
    }
  }

  void check_readers(Region* region, const Readers& r, int thread, int l, u64 address, bool same_value) {
    if (!r.lanes || both_strong(r.instruction, r.cta)) return;
    if (r.cta == c->id ? r.phase < c->phase : c->known.below[r.cta] > r.phase) return;
    for (u32 rest = r.lanes; rest; rest &= rest - 1) {
      Event e{r.cta, u16(r.warp * LANES + __builtin_ctz(rest)), r.phase, r.tick};
      if (before(e, thread)) continue;
      race(region, r.instruction, e, l, address, same_value, true);
      return;
    }
  }

  // Checks lanes that read the same address. Returns those that get garbage.
  u32 check_read(Region* region, u64 address, u32 size, u32 mask) {
    u32 spoiled = 0, tick = 0;
    if (!region->writable) return 0;
    int l = __builtin_ctz(mask);
    for (u32 rest = mask; rest; rest &= rest - 1)
      tick = std::max(tick, c->threads[warp * LANES + __builtin_ctz(rest)].tick);
    Readers mine{c->id, u16(warp), mask, c->phase, tick, pc};
    bool is_shared = region == &c->shadow;
    auto [first, last] = region->span(address, size);
    for (u64 i = first; i <= last; ++i) {
      Cell& x = region->cells[i];
      check_initialised(region, x, address, l);
      if (x.write.cta != NOBODY && !both_strong(x.write_instruction, x.write.cta)) {
        bool known = x.write.cta == c->id ? x.write.phase < c->phase : c->known.below[x.write.cta] > x.write.phase;
        for (u32 rest = known ? 0 : mask; rest; rest &= rest - 1)
          if (!before(x.write, warp * LANES + __builtin_ctz(rest))) {
            race(region, x.write_instruction, x.write, __builtin_ctz(rest), address, false, true);
            if (x.write.cta == c->id && !is_shared) spoiled |= rest & -rest;
          }
      }
      if (!x.readers.lanes) x.readers = mine;
      else if (x.readers.cta == mine.cta && x.readers.warp == mine.warp) x.readers.join(mine);
      else {
        if (!x.others) x.others = u32(more_readers.size()), more_readers.emplace_back();
        auto& list = more_readers[x.others];
        size_t slot = size_t(is_shared ? 0 : mine.cta) * warps + mine.warp;
        if (list.size() <= slot) list.resize(slot + 1);
        if (list[slot].lanes) list[slot].join(mine);
        else list[slot] = mine;
      }
    }
    return spoiled;
  }
  void check_initialised(Region* region, const Cell& cell, u64 address, int l) {
    if (region == &c->shadow && !cell.written) report(UNINITIALISED, l, place(SHARED, address));
  }

  // Messages: what a release publishes at an address and an acquire learns there.

  // A place for messages: an address, told apart by CTA if the memory or the scope is a CTA's.
  u64 mailbox(const Region* region, const u8* at, u8 scope) const {
    u64 address = within(region, at);
    if (region == &c->shadow) return SHARED_WINDOW + (u64(c->id) << 32) + address;
    return scope == GPU_SCOPE ? address : address + (u64(c->id) + 1) * 0x9E3779B97F4A7C15ull;
  }
  void release(u64 box, int thread) {
    Thread& t = c->threads[thread];
    Knowledge& x = messages[box];
    x.join(c->known), x.join(t.extra);
    x.raise(c->id, c->phase);
    x.add(now(thread));
    ++t.tick;
  }
  void acquire(const Region* region, const u8* at, Knowledge& learns) {
    u64 of_gpu = mailbox(region, at, GPU_SCOPE), of_cta = mailbox(region, at, CTA_SCOPE);
    if (auto found = messages.find(of_gpu); found != messages.end()) learns.join(found->second);
    if (of_cta == of_gpu) return;
    if (auto found = messages.find(of_cta); found != messages.end()) learns.join(found->second);
  }
  static bool acquires(const Instruction& i) { return i.order == ACQUIRE || i.order == ACQ_REL; }
  static bool releases(const Instruction& i) { return i.order == RELEASE || i.order == ACQ_REL; }

  void fence(u32 m) {
    for (u32 rest = m; rest; rest &= rest - 1) {
      int thread = warp * LANES + __builtin_ctz(rest);
      Thread& t = c->threads[thread];
      t.extra.join(t.pending);
      t.pending = Knowledge();
      t.fenced = std::make_unique<Knowledge>(c->known);
      t.fenced->join(t.extra);
      t.fenced->raise(c->id, c->phase);
      t.fenced->add(now(thread));
      ++t.tick;
    }
  }

  void load(const Instruction& i, u32 m) {
    u64 a[LANES];
    addresses(i, a);
    u32 size = u32(i.n) * i.bytes, checked = 0, spoiled = 0;
    std::pair<u64, Region*> moved[LANES], *end = moved;
    spend(i);
    for (u32 rest = m; rest; rest &= rest - 1) {
      int l = __builtin_ctz(rest);
      Region* region = nullptr;
      const u8* at = locate(i, l, a[l], size, false, region);
      if (at && region && region != &c->shadow) *end++ = {u64(at), region};
      u8 bad[32];
      const u8* from = at;
      if (at && region && opt->races && !(checked >> l & 1)) {
        u32 same = 1u << l;
        for (u32 others = rest & (rest - 1); others; others &= others - 1) {
          int j = __builtin_ctz(others);
          if (a[j] == a[l]) same |= 1u << j;
          else if (j == l + 1) break;  // as a rule all read one address, or each its own
        }
        checked |= same;
        spoiled |= check_read(region, within(region, at), size, same);
      }
      if (!at || (spoiled >> l & 1 && i.order == WEAK)) {
        memset(bad, at ? 0xFF : GARBAGE, sizeof bad);
        from = bad;
      }
      for (int n = 0; n < i.n; ++n, from += i.bytes) {
        u64 value = 0;
        memcpy(&value, from, i.bytes);
        set_lane(i, n, l, is_signed(i.type) ? extend(value, i.type) : value);
      }
      if (i.order != WEAK && at && region) {
        ++c->spins;
        Thread& t = c->threads[warp * LANES + l];
        acquire(region, at, acquires(i) ? t.extra : t.pending);
      }
    }
    if (opt->traffic) count_traffic(moved, end, size, false);
    if (i.order != WEAK && chance() & 1) budget = 0;
  }

  void store(const Instruction& i, u32 m) {
    u64 a[LANES];
    addresses(i, a);
    u32 size = u32(i.n) * i.bytes;
    std::pair<u64, Region*> moved[LANES], *end = moved;
    spend(i);
    for (u32 rest = m; rest; rest &= rest - 1) {
      int l = __builtin_ctz(rest), thread = warp * LANES + l;
      Region* region = nullptr;
      u8* at = locate(i, l, a[l], size, true, region);
      if (!at) continue;
      if (region && region != &c->shadow) *end++ = {u64(at), region};
      u8 value[32];
      for (int n = 0; n < i.n; ++n) {
        u64 x = lane(i, n, l);
        memcpy(value + n * i.bytes, &x, i.bytes);
      }
      bool same = !memcmp(at, value, size);
      if (region && opt->races) check_write(region, within(region, at), size, l, same);
      memcpy(at, value, size);
      if (!region) continue;
      if (!same) progress();
      if (i.order == WEAK && messages.empty()) continue;
      u64 box = mailbox(region, at, i.scope);
      messages.erase(box);  // a store begins anew what atomics would continue
      if (releases(i)) release(box, thread);
      else if (i.order != WEAK && c->threads[thread].fenced) messages[box] = *c->threads[thread].fenced;
    }
    if (opt->traffic) count_traffic(moved, end, size, true);
    if (i.order != WEAK && chance() & 1) budget = 0;
  }

  template <class T>
  static T arithmetic(u8 update, T old, T b, T d) {
    switch (update) {
      case U_ADD: return T(old + b);
      case U_MIN: return b < old ? b : old;
      case U_MAX: return b > old ? b : old;
      case U_EXCH: return b;
      default: return old == b ? d : old;  // U_CAS
    }
  }
  static u64 updated(const Instruction& i, u64 old, u64 b, u64 d) {
    u64 mask = i.bytes == 8 ? ~0ull : (1ull << 8 * i.bytes) - 1;
    old &= mask, b &= mask, d &= mask;
    switch (i.variant) {
      case U_AND: return old & b;
      case U_OR: return old | b;
      case U_XOR: return old ^ b;
      case U_INC: return old >= b ? 0 : old + 1;
      case U_DEC: return old == 0 || old > b ? b : old - 1;
      default: break;
    }
    switch (i.type) {
      case T_f32: return as<u32>(arithmetic(i.variant, as<float>(u32(old)), as<float>(u32(b)), as<float>(u32(d))));
      case T_f64: return as<u64>(arithmetic(i.variant, as<double>(old), as<double>(b), as<double>(d)));
      case T_s32: return u32(arithmetic(i.variant, i64(i32(old)), i64(i32(b)), i64(i32(d))));
      case T_s64: return u64(arithmetic(i.variant, i64(old), i64(b), i64(d)));
      default: return arithmetic(i.variant, old, b, d) & mask;
    }
  }

  void atomic(const Instruction& i, u32 m) {
    u64 a[LANES];
    addresses(i, a);
    spend(i);
    for (u32 rest = m; rest; rest &= rest - 1) {
      int l = __builtin_ctz(rest), thread = warp * LANES + l;
      Region* region = nullptr;
      u8* at = locate(i, l, a[l], i.bytes, true, region);
      if (!at) continue;
      u64 old = 0;
      memcpy(&old, at, i.bytes);
      u64 b = lane(i, 1, l), value;
      if (i.type == T_f32 && i.variant == U_ADD && region != &c->shadow)  // knows no denormals in global memory
        value = as<u32>(flush(flush(as<float>(u32(old))) + flush(as<float>(u32(b)))));
      else value = updated(i, old, b, lane(i, 2, l));
      if (region) {
        if (opt->races) {
          auto [first, last] = region->span(within(region, at), i.bytes);
          for (u64 cell = first; cell <= last && i.variant != U_EXCH; ++cell)
            check_initialised(region, region->cells[cell], within(region, at), l);
          check_write(region, within(region, at), i.bytes, l, value == old);
        }
        Thread& t = c->threads[thread];
        acquire(region, at, acquires(i) ? t.extra : t.pending);
        u64 box = mailbox(region, at, i.scope);
        if (releases(i)) release(box, thread);
        else if (t.fenced) messages[box].join(*t.fenced);
      }
      memcpy(at, &value, i.bytes);
      if (value != old) progress();
      else ++c->spins;
      set_lane(i, 0, l, old);
    }
    if (chance() & 1) budget = 0;
  }

  // n matrices of 8 rows of 8 times 16 bits. Lanes 8 k to 8 k + 7 hold the addresses of the rows of matrix k.
  void ldmatrix(const Instruction& i, u32 m) {
    u64 a[LANES];
    addresses(i, a);
    ++accesses;
    for (int n = 0; n < i.n; ++n) {
      u16 tile[8][8];
      for (int row = 0; row < 8; ++row) {
        int l = 8 * n + row;
        Region* region = nullptr;
        const u8* at = locate(i, l, a[l], 16, false, region);
        if (at && opt->races) check_read(region, within(region, at), 16, 1u << l);
        if (at) memcpy(tile[row], at, 16);
        else memset(tile[row], GARBAGE, 16);
      }
      put(target<u32>(i.r[n]), m, [&](int l) {
        int row = l / 4, column = 2 * (l % 4);
        return i.variant ? u32(tile[column][row]) | u32(tile[column + 1][row]) << 16
                         : u32(tile[row][column]) | u32(tile[row][column + 1]) << 16;
      });
    }
  }

  // Between the lanes of a warp.

  void shuffle(const Instruction& i, u32 m) {
    auto a = source<u32>(i.r[2]), b = source<u32>(i.r[3]), clamp = source<u32>(i.r[4]);
    u32 out[LANES], valid = 0;
    for (int l = 0; l < LANES; ++l) {
      int by = b[l] & 31, bound = clamp[l] & 31, segment = clamp[l] >> 8 & 31;
      int last = (l & segment) | (bound & ~segment), first = l & segment, from;
      switch (i.variant) {
        case UP: from = l - by; break;
        case DOWN: from = l + by; break;
        case BFLY: from = l ^ by; break;
        default: from = first | (by & ~segment);
      }
      bool ok = i.variant == UP ? from >= last : from <= last;
      if (!ok) from = l;
      if (m >> l & 1 && !(m >> from & 1)) report(DIVERGED, l, "reads a lane that does not take part");
      out[l] = a[from];
      valid |= u32(ok) << l;
    }
    if (i.r[0] != NONE) put(target<u32>(i.r[0]), m, [&](int l) { return out[l]; });
    set_predicate(i.r[1], m, valid);
  }

  void vote(const Instruction& i, u32 m) {
    u32 yes = source_predicate(i, 2) & m;
    if (i.variant == VOTE_BALLOT) {
      put(target<u32>(i.r[0]), m, [&](int) { return yes; });
      return;
    }
    bool all = yes == m, any = yes != 0;
    set_predicate(i.r[0], m, (i.variant == VOTE_ALL ? all : i.variant == VOTE_ANY ? any : all || !any) ? ALL : 0);
  }

  void redux(const Instruction& i, u32 m) {
    Instruction update = i;
    update.bytes = 4;
    u32 sum = source<u32>(i.r[2])[__builtin_ctz(m)];
    for (u32 rest = m & (m - 1); rest; rest &= rest - 1)
      sum = u32(updated(update, sum, source<u32>(i.r[2])[__builtin_ctz(rest)], 0));
    put(target<u32>(i.r[0]), m, [&](int) { return sum; });
  }

  void match_any(const Instruction& i, u32 m) {
    auto a = source<u32>(i.r[2]);
    put(target<u32>(i.r[0]), m, [&](int l) {
      u32 out = 0;
      for (int j = 0; j < LANES; ++j) out |= u32(m >> j & 1 && a[j] == a[l]) << j;
      return out;
    });
  }

  void barrier_of_warp(u32 m) {
    std::vector<int> who;
    for (u32 rest = m; rest; rest &= rest - 1) who.push_back(warp * LANES + __builtin_ctz(rest));
    meet(who);
  }

  u64 special(u8 which, int l) const {
    u32 t = u32(warp * LANES + l);
    const u32* block = opt->block;
    switch (which) {
      case R_tid_x: return t % block[0];
      case R_tid_y: return t / block[0] % block[1];
      case R_tid_z: return t / block[0] / block[1];
      case R_ntid_x: case R_ntid_y: case R_ntid_z: return block[which - R_ntid_x];
      case R_ctaid_x: case R_ctaid_y: case R_ctaid_z: return c->index[which - R_ctaid_x];
      case R_nctaid_x: case R_nctaid_y: case R_nctaid_z: return opt->grid[which - R_nctaid_x];
      case R_laneid: return u32(l);
      case R_warpid: return u32(warp);
      case R_lanemask_eq: return 1u << l;
      case R_lanemask_lt: return (1u << l) - 1;
      case R_lanemask_le: return (2u << l) - 1;
      case R_lanemask_gt: return ~((2u << l) - 1);
      case R_lanemask_ge: return ~((1u << l) - 1);
      default: return instructions;  // clocks
    }
  }

  void load_parameter(const Instruction& i, u32 m) {
    for (int n = 0; n < i.n; ++n) {
      u64 value = 0;
      memcpy(&value, parameters + i.immediate + n * i.bytes, i.bytes);
      for (int l = 0; l < LANES; ++l)
        if (m >> l & 1) set_lane(i, n, l, extend(value, i.type));
    }
  }

  void execute(const Instruction& i, u32 m) {
    switch (i.op) {
      case O_nop: return;
      case O_ld: load(i, m); return;
      case O_st: store(i, m); return;
      case O_atom: atomic(i, m); return;
      case O_fence: fence(m); return;
      case O_ldmatrix: ldmatrix(i, m); return;
      case O_ld_param: load_parameter(i, m); return;
      case O_shfl: shuffle(i, m); return;
      case O_vote: vote(i, m); return;
      case O_redux: redux(i, m); return;
      case O_match_any: match_any(i, m); return;
      case O_bar_warp: barrier_of_warp(m); return;
      case O_activemask: put(target<u32>(i.r[0]), m, [&](int) { return m; }); return;
      case O_elect: {
        u32 first = u32(__builtin_ctz(m));
        if (i.r[0] != NONE) put(target<u32>(i.r[0]), m, [&](int) { return first; });
        set_predicate(i.r[1], m, 1u << first);
        return;
      }
      case O_special:
        for (int l = 0; l < LANES; ++l)
          if (m >> l & 1) set_lane(i, 0, l, special(u8(i.immediate), l));
        return;
      case O_trap:
        report(TRAP, __builtin_ctz(m), "the kernel's own");
        stop = true;
        return;
      default:
        if (calculate(i, m)) return;
        report(TRAP, __builtin_ctz(m), "decode.py lets an instruction pass that the machine does not know");
        stop = true;
    }
  }
};

}  // namespace ptx

// For ctypes. Pass each pointer that is returned to its own ptx_free_ function.
using namespace ptx;
extern "C" {
const char* ptx_names(int which) {  // ops, types or special registers
#define X(o) #o " "
  static const char* const names[] = {PTX_OPS(X), PTX_TYPES(X), PTX_SPECIALS(X)};
#undef X
  return names[which];
}
int ptx_size(int which) { return which ? int(sizeof(Options)) : int(sizeof(Instruction)); }
Kernel* ptx_kernel(const Instruction* code, int n, const u8* constants, int bytes, int registers, int shared, int local,
                   int shared_shift) {
  return new Kernel{{code, code + n}, {constants, constants + bytes}, registers, shared, local, shared_shift};
}
void ptx_free_kernel(Kernel* kernel) { delete kernel; }
Machine* ptx_machine() { return new Machine; }
void ptx_free_machine(Machine* machine) { delete machine; }
void ptx_region(Machine* machine, u64 begin, u64 end, int shift, int writable, const char* name, const u8* holes) {
  std::vector<u8> of_cells;
  if (holes) of_cells.assign(holes, holes + ((end - begin) >> shift));
  machine->regions.push_back(std::make_unique<Region>(Region{begin, end, shift, bool(writable), name, of_cells, {}, {}}));
}
int ptx_launch(Machine* machine, const Kernel* kernel, const Options* options, const u8* arguments) {
  machine->launch(*kernel, *options, arguments);
  return int(machine->findings.size());
}
const char* ptx_finding(Machine* machine, int i, i64* numbers) {
  auto& f = machine->findings[i];
  i64 all[] = {f.kind, f.instruction, f.other, f.cta, f.thread, f.other_cta, f.other_thread, i64(f.count)};
  memcpy(numbers, all, sizeof all);
  return f.where.c_str();
}
void ptx_traffic(Machine* machine, u64 begin, u64* traffic) {
  for (auto& region : machine->regions)
    if (region->begin == begin) memcpy(traffic, region->traffic, sizeof region->traffic);
}
void ptx_counts(Machine* machine, u64* executed, u64* lanes, u64* totals) {
  memcpy(executed, machine->executed.data(), 8 * machine->executed.size());
  memcpy(lanes, machine->lanes_executed.data(), 8 * machine->lanes_executed.size());
  totals[0] = machine->instructions, totals[1] = machine->switches, totals[2] = machine->accesses;
}
}
