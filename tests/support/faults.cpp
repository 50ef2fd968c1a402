// Makes operations on the files below a folder fail, as a full disk or a folder without rights does.
//
// Loaded by LD_PRELOAD, and told by tests/support/faults.py what fails and when. It stands before the C library, so that
// files of pyarrow and torch are caught as Python's are. The disk itself is left alone.
//
// For tests/support/power.py it also keeps what a power cut could not take: the bytes of every file at its last fsync,
// and the names in every folder at its last fsync, by number of inode.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <atomic>

namespace {

// The kinds of operations; FAULTS in faults.py has the same numbers.
enum Kind { MAKE = 1, OPEN = 2, READ = 4, WRITE = 8, SYNC = 16, RENAME = 32, FOLDER = 64, REMOVE = 128, CUT = 256 };

char folder[4096], kept[4096];
int kinds = 0, error = 0;
bool once = false;
long first = 0;
std::atomic<long> counted{0}, failed{0};  // a thread writes while another one reads

bool below(const char* path) {
  size_t length = strlen(folder);
  return length && !strncmp(path, folder, length) && (path[length] == '/' || path[length] == 0);
}

bool below(int file) {
  char name[64], path[4096];
  snprintf(name, sizeof name, "/proc/self/fd/%d", file);
  ssize_t length = readlink(name, path, sizeof path - 1);
  if (length < 0) return false;
  path[length] = 0;
  return below(path);
}

bool below(int at, const char* path) { return path[0] == '/' ? below(path) : at != AT_FDCWD && below(at); }

// Whether this operation, which is of one of the kinds, has to fail.
bool fails(int kind, bool ours) {
  if (!(kind & kinds) || !ours) return false;
  long place = ++counted;
  if (once ? place != first : place < first) return false;
  if (error < 0) _exit(1);  // the power is cut
  ++failed;
  errno = error;
  return true;
}

template <class F>
F real(F, const char* name) {
  return reinterpret_cast<F>(dlsym(RTLD_NEXT, name));
}

FILE* keep(ino_t number) {
  char name[4200];
  snprintf(name, sizeof name, "%s/%llu", kept, (unsigned long long)number);
  return real((FILE * (*)(const char*, const char*)) nullptr, "fopen")(name, "w");
}

// What a file or folder of this path holds is on the disk; `empty`: it was made, and has nothing there.
void keep(const char* path, bool empty) {
  struct stat about;
  if (!*kept || !below(path) || lstat(path, &about)) return;
  FILE* out = keep(about.st_ino);
  if (!out) abort();
  // Held open to the end: a file made after this one is removed would get its number, and the folder's old names its bytes.
  if (empty) real((int (*)(const char*, int, ...)) nullptr, "open")(path, O_PATH | O_CLOEXEC);
  if (!empty && S_ISDIR(about.st_mode)) {
    DIR* names = real((DIR * (*)(const char*)) nullptr, "opendir")(path);
    while (struct dirent* one = readdir(names))
      if (one->d_name[0] != '.' || (one->d_name[1] && strcmp(one->d_name, "..")))
        fprintf(out, "%llu %d %s\n", (unsigned long long)one->d_ino, one->d_type == DT_DIR, one->d_name);
    closedir(names);
  } else if (!empty) {
    FILE* in = real((FILE * (*)(const char*, const char*)) nullptr, "fopen")(path, "r");
    char part[65536];
    for (size_t n; (n = fread(part, 1, sizeof part, in)) > 0;) fwrite(part, 1, n, out);
    fclose(in);
  }
  fclose(out);
}

void keep(int file, bool empty) {
  char name[64], path[4096];
  snprintf(name, sizeof name, "/proc/self/fd/%d", file);
  ssize_t length = *kept ? readlink(name, path, sizeof path - 1) : -1;
  if (length < 0) return;
  path[length] = 0;
  keep(path, empty);
}

bool makes(int at, const char* path, int flags) {
  return (flags & O_ACCMODE) != O_RDONLY && (flags & O_CREAT) && faccessat(at, path, F_OK, 0);
}

bool opening_fails(int at, const char* path, int flags) {
  int kind = (flags & O_ACCMODE) == O_RDONLY ? READ : makes(at, path, flags) ? MAKE : OPEN;
  return fails(kind, below(at, path));
}

int opened(int file, bool made) {
  if (made && file >= 0) keep(file, true);
  return file;
}

// The first write that fails takes half of the bytes, as a disk does that has little room left.
template <class Write>
ssize_t half(int file, size_t count, Write write) {
  bool begins = counted + 1 == first;
  if (!fails(WRITE, below(file))) return write(count);
  if (!once && begins && count > 1) return write(count / 2);
  return -1;
}

}  // namespace

extern "C" {

// From the n-th operation of these kinds on all fail, or that one alone.
// A negative error ends the process there. What is on the disk is kept in the folder `keeps`, if it is not empty.
void faults_arm(const char* below, int which, int number, long n, int alone, const char* keeps) {
  strncpy(folder, below, sizeof folder - 1);
  strncpy(kept, keeps, sizeof kept - 1);
  kinds = which, error = number, first = n, once = alone, counted = 0, failed = 0;
}

long faults_counted() { return counted; }
long faults_failed() { return failed; }

#define OPENER(NAME)                                        \
  int NAME(const char* path, int flags, ...) {              \
    va_list rest;                                           \
    va_start(rest, flags);                                  \
    mode_t mode = va_arg(rest, mode_t);                     \
    va_end(rest);                                           \
    if (opening_fails(AT_FDCWD, path, flags)) return -1;    \
    bool made = *kept && makes(AT_FDCWD, path, flags);      \
    return opened(real((int (*)(const char*, int, ...))nullptr, #NAME)(path, flags, mode), made); \
  }
OPENER(open)
OPENER(open64)

#define OPENER_AT(NAME)                                     \
  int NAME(int at, const char* path, int flags, ...) {      \
    va_list rest;                                           \
    va_start(rest, flags);                                  \
    mode_t mode = va_arg(rest, mode_t);                     \
    va_end(rest);                                           \
    if (opening_fails(at, path, flags)) return -1;          \
    bool made = *kept && makes(at, path, flags);            \
    return opened(real((int (*)(int, const char*, int, ...))nullptr, #NAME)(at, path, flags, mode), made); \
  }
OPENER_AT(openat)
OPENER_AT(openat64)

#define STREAM(NAME)                                                        \
  FILE* NAME(const char* path, const char* mode) {                          \
    int flags = strpbrk(mode, "wa+") ? O_WRONLY | (mode[0] == 'r' ? 0 : O_CREAT) : O_RDONLY; \
    if (opening_fails(AT_FDCWD, path, flags)) return nullptr;               \
    bool made = *kept && makes(AT_FDCWD, path, flags);                      \
    FILE* file = real((FILE * (*)(const char*, const char*)) nullptr, #NAME)(path, mode); \
    if (file && made) keep(path, true);                                     \
    return file;                                                            \
  }
STREAM(fopen)
STREAM(fopen64)

DIR* opendir(const char* path) {
  if (fails(READ, below(path))) return nullptr;
  return real((DIR * (*)(const char*)) nullptr, "opendir")(path);
}

ssize_t write(int file, const void* data, size_t count) {
  auto next = real((ssize_t(*)(int, const void*, size_t))nullptr, "write");
  return half(file, count, [&](size_t n) { return next(file, data, n); });
}

ssize_t writev(int file, const struct iovec* parts, int count) {
  auto next = real((ssize_t(*)(int, const struct iovec*, int))nullptr, "writev");
  return half(file, 1, [&](size_t) { return next(file, parts, count); });
}

#define PLACED(NAME)                                                              \
  ssize_t NAME(int file, const void* data, size_t count, off64_t at) {            \
    auto next = real((ssize_t(*)(int, const void*, size_t, off64_t))nullptr, #NAME); \
    return half(file, count, [&](size_t n) { return next(file, data, n, at); });  \
  }
PLACED(pwrite)
PLACED(pwrite64)

#define SYNC_OF(NAME)                               \
  int NAME(int file) {                              \
    if (fails(SYNC, below(file))) return -1;        \
    int status = real((int (*)(int))nullptr, #NAME)(file); \
    if (!status) keep(file, false);                 \
    return status;                                  \
  }
SYNC_OF(fsync)
SYNC_OF(fdatasync)

int rename(const char* from, const char* to) noexcept {
  if (fails(RENAME, below(to))) return -1;
  return real((int (*)(const char*, const char*))nullptr, "rename")(from, to);
}

int mkdir(const char* path, mode_t mode) noexcept {
  // One that is there fails without any help.
  if (access(path, F_OK) && fails(FOLDER, below(path))) return -1;
  int status = real((int (*)(const char*, mode_t))nullptr, "mkdir")(path, mode);
  if (!status) keep(path, true);
  return status;
}

int unlink(const char* path) noexcept {
  if (!access(path, F_OK) && fails(REMOVE, below(path))) return -1;
  return real((int (*)(const char*))nullptr, "unlink")(path);
}

int unlinkat(int at, const char* path, int flags) noexcept {
  if (fails(REMOVE, below(at, path))) return -1;
  return real((int (*)(int, const char*, int))nullptr, "unlinkat")(at, path, flags);
}

int rmdir(const char* path) noexcept {
  if (!access(path, F_OK) && fails(REMOVE, below(path))) return -1;
  return real((int (*)(const char*))nullptr, "rmdir")(path);
}

#define CUTTER(NAME, SIZE)                                        \
  int NAME(int file, SIZE length) noexcept {                      \
    if (fails(CUT, below(file))) return -1;                       \
    return real((int (*)(int, SIZE))nullptr, #NAME)(file, length); \
  }
CUTTER(ftruncate, off_t)
CUTTER(ftruncate64, off64_t)
}
