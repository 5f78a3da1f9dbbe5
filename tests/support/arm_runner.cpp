// Calls functions of shared libraries for a process of another architecture: an emulator runs this program, and
// arm_emulation.py talks to it over its standard input and output.
//
// A request, all numbers int64_t: the sizes of the library's path, of the function's name, of each span of memory that
// the call touches, and the kind, value and span of each argument; see `Request` for the order. The answer: the spans
// as the call left them. Each span ends where readable memory ends, so that a read or write behind it ends the program.

#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace {

[[noreturn]] void fail(const char* what, const char* which) {
  std::fprintf(stderr, "arm_runner: %s %s\n", what, which);
  std::exit(1);
}

void read_all(void* to, size_t size) {
  if (size && std::fread(to, 1, size, stdin) != size) std::exit(0);  // the other side is gone
}

int64_t read_number() {
  int64_t value;
  read_all(&value, sizeof value);
  return value;
}

std::string read_text() {
  std::string text(read_number(), '\0');
  read_all(&text[0], text.size());
  return text;
}

// Memory whose last byte is the last of its page, before a page that may not be touched.
struct Span {
  size_t page = sysconf(_SC_PAGESIZE), size, pages;
  char* memory;

  explicit Span(size_t bytes) : size(bytes), pages((bytes + page - 1) / page) {
    memory = (char*)mmap(nullptr, (pages + 1) * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory + pages * page, page, PROT_NONE)) fail("no memory for", "a span");
  }
  void release() { munmap(memory, (pages + 1) * page); }
  char* first() { return memory + pages * page - size; }
};

enum Kind : int64_t { kInteger, kNumber, kAddress };

// Integers and addresses go into one sequence of registers and stack slots, floating numbers into another.
struct Arguments {
  int64_t integers[48] = {};
  double numbers[2] = {};
};

using Function = void (*)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                          int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                          int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                          int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                          int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, double, double);

template <size_t... I>
void call(void* function, const Arguments& by, std::index_sequence<I...>) {
  ((Function)function)(by.integers[I]..., by.numbers[0], by.numbers[1]);
}

void* symbol(const std::string& library, const std::string& name) {
  void* handle = dlopen(library.c_str(), RTLD_NOW);  // opened once, however often it is asked for
  if (!handle) fail("cannot load", dlerror());
  void* found = dlsym(handle, name.c_str());
  if (!found) fail("cannot find", name.c_str());
  return found;
}

void write_all(const void* from, size_t size) {
  if (std::fwrite(from, 1, size, stdout) != size) fail("cannot write", "the answer");
}

Arguments read_arguments(std::vector<Span>& spans) {
  Arguments by;
  const int64_t count = read_number();
  int integers = 0, numbers = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t kind = read_number(), value = read_number(), span = read_number();
    if (kind == kNumber) {
      if (numbers == 2) fail("too many arguments of", "floating numbers");
      std::memcpy(&by.numbers[numbers++], &value, sizeof value);
    } else {
      if (integers == 48) fail("too many arguments of", "integers");
      by.integers[integers++] = kind == kAddress ? (int64_t)(spans[span].first() + value) : value;
    }
  }
  return by;
}

// supports LEVEL: what afnext_supports of the library says, as its exit status.
int supports(const char* library, const char* level) {
  return ((int (*)(const char*))symbol(library, "afnext_supports"))(level);
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 3) return supports(arguments[1], arguments[2]) ? 0 : 3;
  while (true) {
    const std::string library = read_text(), name = read_text();
    std::vector<Span> spans;
    for (int64_t left = read_number(); left; --left) {
      spans.emplace_back(read_number());
      read_all(spans.back().first(), spans.back().size);
    }
    const Arguments by = read_arguments(spans);
    call(symbol(library, name), by, std::make_index_sequence<48>());
    for (Span& span : spans) {
      write_all(span.first(), span.size);
      span.release();
    }
    std::fflush(stdout);
  }
}
