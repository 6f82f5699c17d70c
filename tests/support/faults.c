/* Preloaded into a process, counts every step by which it changes files below one folder, and at a chosen step dies,
   fails or writes only half. In: faults_arm() or the environment. Out: the log of steps, with the bytes written.
   See faults.py, which compiles and drives this. Linux only. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, DIE_BEFORE, DIE_AFTER, FAIL, FAIL_ONCE, SHORT, TORN, FULL };

static char root[PATH_MAX];
static size_t root_length;
static long target, steps, budget;
static int mode, error_number, log_file = -1;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

#define MAX_FILES 65536
static char watched[MAX_FILES]; /* file descriptors below the root that are open for writing, or folders */

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* Steps from `target` on (mode FULL: writes beyond `budget` bytes) go wrong as `mode` says; log -1: none. */
void faults_arm(const char *folder, long step, int how, int error, long bytes, int log) {
    snprintf(root, sizeof root, "%s", folder);
    root_length = strlen(root);
    target = step, steps = 0, mode = how, error_number = error, budget = bytes, log_file = log;
}

__attribute__((constructor)) static void arm_from_environment(void) {
    const char *plan = getenv("FAULTS"); /* STEP:MODE:ERROR:BYTES:FOLDER */
    long step, bytes;
    int how, error, used = 0;
    if (plan && sscanf(plan, "%ld:%d:%d:%ld:%n", &step, &how, &error, &bytes, &used) == 4)
        faults_arm(plan + used, step, how, error, bytes, -1);
}

static int below(const char *path) {
    return root_length && !strncmp(path, root, root_length) && (path[root_length] == '/' || !path[root_length]);
}

static void absolute(int folder, const char *path, char *found) {
    char base[PATH_MAX] = "";
    if (path[0] != '/') {
        if (folder == AT_FDCWD) {
            if (!getcwd(base, sizeof base)) base[0] = 0;
        } else {
            char link[64];
            snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
            ssize_t length = readlink(link, base, sizeof base - 1);
            base[length > 0 ? length : 0] = 0;
        }
        snprintf(found, PATH_MAX, "%.2000s/%.2000s", base, path);
    } else
        snprintf(found, PATH_MAX, "%s", path);
}

static void name_of(int file, char *found) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, found, PATH_MAX - 1);
    found[length > 0 ? length : 0] = 0;
}

static void die(void) { syscall(SYS_kill, getpid(), SIGKILL); }

static void note(const char *what, const char *first, const char *second, long offset, const void *data, size_t size) {
    if (log_file < 0) return;
    char head[3 * PATH_MAX];
    int length = snprintf(head, sizeof head, "%s%c%s%c%s%c%ld%c%zu\n", what, 0, first, 0, second, 0, offset, 0, data ? size : 0);
    uint32_t prefix = (uint32_t)length;
    syscall(SYS_write, log_file, &prefix, sizeof prefix);
    syscall(SYS_write, log_file, head, length);
    if (data) syscall(SYS_write, log_file, data, size);
}

/* Before a step: -1 if it is to fail (errno is set), 1 if this is the one that goes wrong afterwards, else 0. */
static int begin(void) {
    long here = steps++;
    if (mode == COUNT || mode == FULL || here < target) return 0;
    if (mode == DIE_BEFORE && here == target) die();
    if (mode == FAIL || (mode == FAIL_ONCE && here == target)) {
        errno = error_number;
        return -1;
    }
    return here == target;
}

static void end(int chosen) {
    if (chosen && (mode == DIE_AFTER || mode == TORN)) die();
}

#define STEP(call, what, first, second, offset, data, size)          \
    ({                                                               \
        pthread_mutex_lock(&lock);                                   \
        int chosen_ = begin();                                       \
        long result_ = chosen_ < 0 ? -1 : (long)(call);              \
        note(result_ < 0 ? "failed" : what, first, second, offset, data, size); \
        if (chosen_ >= 0) end(chosen_);                              \
        pthread_mutex_unlock(&lock);                                 \
        result_;                                                     \
    })

static int opened(int (*call)(int, const char *, int, mode_t), int folder, const char *path, int flags, mode_t permissions) {
    char full[PATH_MAX];
    int changes = flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC);
    /* a file that never gets a name (filelock tries locks on one) leaves nothing behind: not a change of the disk */
    if (!root_length || (flags & O_TMPFILE) == O_TMPFILE) return call(folder, path, flags, permissions);
    absolute(folder, path, full);
    if (!below(full)) return call(folder, path, flags, permissions);
    int file = changes ? (int)STEP(call(folder, path, flags, permissions), flags & O_TRUNC ? "truncate" : "open", full, "", 0, NULL, 0)
                       : call(folder, path, flags, permissions);
    if (file >= 0 && file < MAX_FILES) watched[file] = 1;
    return file;
}

static int call_openat(int folder, const char *path, int flags, mode_t permissions) {
    return (int)syscall(SYS_openat, folder, path, flags, permissions);
}

#define PERMISSIONS                       \
    va_list rest;                         \
    va_start(rest, flags);                \
    mode_t permissions = va_arg(rest, int); \
    va_end(rest);

int open(const char *path, int flags, ...) { PERMISSIONS return opened(call_openat, AT_FDCWD, path, flags, permissions); }
int open64(const char *path, int flags, ...) { PERMISSIONS return opened(call_openat, AT_FDCWD, path, flags | O_LARGEFILE, permissions); }
int openat(int folder, const char *path, int flags, ...) { PERMISSIONS return opened(call_openat, folder, path, flags, permissions); }
int openat64(int folder, const char *path, int flags, ...) { PERMISSIONS return opened(call_openat, folder, path, flags | O_LARGEFILE, permissions); }
int creat(const char *path, mode_t permissions) { return opened(call_openat, AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, permissions); }

int close(int file) {
    if (file >= 0 && file < MAX_FILES) watched[file] = 0;
    return REAL(close)(file);
}

#define IS_WATCHED(file) (root_length && (file) >= 0 && (file) < MAX_FILES && watched[file])

/* A write of `size` bytes, which may be cut short, die in its middle, or find the disk full. */
static ssize_t written(int file, const void *data, size_t size, long offset, int positioned) {
    char name[PATH_MAX];
    name_of(file, name);
    long at = positioned ? offset : lseek(file, 0, SEEK_CUR);
    pthread_mutex_lock(&lock);
    int chosen = begin();
    ssize_t result = -1;
    if (chosen >= 0) {
        if (chosen && (mode == SHORT || mode == TORN) && size > 1) size /= 2;
        if (mode == FULL) {
            if (budget <= 0) {
                errno = error_number;
                pthread_mutex_unlock(&lock);
                return -1;
            }
            if ((long)size > budget) size = budget;
            budget -= size;
        }
        result = positioned ? syscall(SYS_pwrite64, file, data, size, offset) : syscall(SYS_write, file, data, size);
        note(result < 0 ? "failed" : "write", name, "", at, data, result < 0 ? 0 : result);
        end(chosen);
    }
    pthread_mutex_unlock(&lock);
    return result;
}

ssize_t write(int file, const void *data, size_t size) {
    return IS_WATCHED(file) ? written(file, data, size, 0, 0) : syscall(SYS_write, file, data, size);
}
ssize_t pwrite(int file, const void *data, size_t size, off_t offset) {
    return IS_WATCHED(file) ? written(file, data, size, offset, 1) : syscall(SYS_pwrite64, file, data, size, offset);
}
ssize_t pwrite64(int file, const void *data, size_t size, off64_t offset) { return pwrite(file, data, size, offset); }
ssize_t writev(int file, const struct iovec *parts, int count) {
    if (!IS_WATCHED(file)) return REAL(writev)(file, parts, count);
    return count ? written(file, parts[0].iov_base, parts[0].iov_len, 0, 0) : 0; /* short, which is allowed */
}
/* Copies inside the kernel are refused as on file systems without them: the caller then reads and writes. */
ssize_t sendfile(int out, int in, off_t *offset, size_t count) {
    if (!IS_WATCHED(out)) return REAL(sendfile)(out, in, offset, count);
    errno = EINVAL;
    return -1;
}
ssize_t sendfile64(int out, int in, off64_t *offset, size_t count) { return sendfile(out, in, offset, count); }
ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t count, unsigned flags) {
    if (!IS_WATCHED(out)) return REAL(copy_file_range)(in, from, out, to, count, flags);
    errno = EXDEV;
    return -1;
}

static int sync_file(int file, const char *what, long number) {
    char name[PATH_MAX];
    if (!IS_WATCHED(file)) return (int)syscall(number, file);
    name_of(file, name);
    return (int)STEP(syscall(number, file), what, name, "", 0, NULL, 0);
}
int fsync(int file) { return sync_file(file, "fsync", SYS_fsync); }
int fdatasync(int file) { return sync_file(file, "fsync", SYS_fdatasync); }

int ftruncate(int file, off_t size) {
    char name[PATH_MAX];
    if (!IS_WATCHED(file)) return (int)syscall(SYS_ftruncate, file, size);
    name_of(file, name);
    return (int)STEP(syscall(SYS_ftruncate, file, size), "resize", name, "", size, NULL, 0);
}
int ftruncate64(int file, off64_t size) { return ftruncate(file, size); }

int renameat2(int from, const char *old, int to, const char *new, unsigned flags) {
    char first[PATH_MAX], second[PATH_MAX];
    absolute(from, old, first), absolute(to, new, second);
    if (!below(first) && !below(second)) return (int)syscall(SYS_renameat2, from, old, to, new, flags);
    return (int)STEP(syscall(SYS_renameat2, from, old, to, new, flags), flags ? "exchange" : "rename", first, second, 0, NULL, 0);
}
int rename(const char *old, const char *new) { return renameat2(AT_FDCWD, old, AT_FDCWD, new, 0); }
int renameat(int from, const char *old, int to, const char *new) { return renameat2(from, old, to, new, 0); }

static int on_path(const char *what, int folder, const char *path, long number, int flags) {
    char full[PATH_MAX];
    absolute(folder, path, full);
    if (!below(full)) return (int)syscall(number, folder, path, flags);
    return (int)STEP(syscall(number, folder, path, flags), what, full, "", 0, NULL, 0);
}
int unlinkat(int folder, const char *path, int flags) {
    return on_path(flags & AT_REMOVEDIR ? "rmdir" : "unlink", folder, path, SYS_unlinkat, flags);
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }
int mkdirat(int folder, const char *path, mode_t permissions) { return on_path("mkdir", folder, path, SYS_mkdirat, permissions); }
int mkdir(const char *path, mode_t permissions) { return mkdirat(AT_FDCWD, path, permissions); }
