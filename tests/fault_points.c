/* Counts every change that a process makes to files below given folders, and does harm at the n-th: preloaded.
 *
 * A change is a call that creates, writes, renames, removes or syncs. It knows no store and no stage; tests/faults.py
 * compiles and arms it. Libraries that are no Python (Arrow, torch, safetensors) are seen as well.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum harm { NOTHING, KILL, TERM, TORN, FULL, READ_ONLY, VANISH, CLOCK, FAIL_ONCE }; /* as in tests/faults.py */
enum sort { CREATE, WRITE, RENAME, REMOVE, SYNC };
static const char *SORTS[] = {"create", "write", "rename", "remove", "sync"};

static char roots[4][PATH_MAX];
static int n_roots, harm, code, log_fd = -1;
static long at;
static time_t back_s;
static atomic_long count;

/* Below these folders (joined by ':'), at the n-th change (from 1); the first alone vanishes or is read-only. Every
 * change goes into the log, if one is named. */
void fault_arm(const char *folders, int what, long number, int error, const char *log_path) {
    n_roots = 0;
    for (const char *from = folders; *from && n_roots < 4;) {
        size_t size = strcspn(from, ":");
        snprintf(roots[n_roots++], PATH_MAX, "%.*s", (int)size, from);
        from += size + (from[size] == ':');
    }
    harm = what, at = number, code = error, back_s = 0;
    atomic_store(&count, 0);
    if (*log_path)
        log_fd = (int)syscall(SYS_openat, AT_FDCWD, log_path, O_CREAT | O_WRONLY | O_APPEND | O_CLOEXEC, 0644);
}

static int is_below(const char *path, const char *root) {
    size_t size = strlen(root);
    return !strncmp(path, root, size) && (!path[size] || path[size] == '/');
}

static int is_ours(const char *path) {
    for (int i = 0; i < n_roots; i++)
        if (is_below(path, roots[i])) return 1;
    return 0;
}

static int absolute(int dir, const char *path, char *into) {
    char link[64], base[PATH_MAX];
    if (*path == '/') return snprintf(into, PATH_MAX, "%s", path) < PATH_MAX;
    if (dir == AT_FDCWD) {
        if (!getcwd(base, sizeof base)) return 0;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
        ssize_t size = readlink(link, base, sizeof base - 1);
        if (size < 0) return 0;
        base[size] = 0;
    }
    return snprintf(into, PATH_MAX, *path ? "%s/%s" : "%s", base, path) < PATH_MAX;
}

/* The first folder goes away under the feet of whoever works in it: NAME.gone. */
static void vanish(void) {
    char gone[PATH_MAX];
    if (snprintf(gone, sizeof gone, "%s.gone", roots[0]) < (int)sizeof gone)
        syscall(SYS_renameat2, AT_FDCWD, roots[0], AT_FDCWD, gone, 0);
}

static void tell(long number, enum sort sort, const char *path) {
    char line[PATH_MAX + 64];
    int size = snprintf(line, sizeof line, "%ld %s %s\n", number, SORTS[sort], path);
    if (log_fd >= 0 && syscall(SYS_write, log_fd, line, (size_t)size) < 0) log_fd = -1;
}

/* 0 = the call goes on; 1 = it fails, errno is set; 2 = a write of which half gets through before the end. */
static int meet(enum sort sort, int dir, const char *path) {
    char full[PATH_MAX];
    int kept = errno, is_there;
    if (!n_roots || !absolute(dir, path, full) || !is_ours(full)) return errno = kept, 0;
    long number = atomic_fetch_add(&count, 1) + 1;
    is_there = sort == CREATE && !syscall(SYS_faccessat, AT_FDCWD, full, F_OK);
    tell(number, sort, full);
    errno = kept;
    if (number < at) return 0;
    if (harm == FULL && (sort == WRITE || (sort == CREATE && !is_there))) return errno = ENOSPC, 1;
    if (harm == READ_ONLY && is_below(full, roots[0])) return errno = is_there ? EEXIST : EROFS, 1;
    if (number > at) return 0;
    switch (harm) {
    case TORN: if (sort == WRITE) return 2; /* fall through */
    case KILL: kill(getpid(), SIGKILL); break;
    case TERM: kill(getpid(), SIGTERM); break;
    case VANISH: vanish(); break;
    case CLOCK: back_s = code; break;
    case FAIL_ONCE: return errno = code, 1;
    }
    return 0;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* Opened for writing: what is there already takes no room on a full disk, and cannot be opened on a read-only one. */
static int opens(int dir, const char *path, int flags) {
    if ((flags & O_ACCMODE) == O_RDONLY && !(flags & (O_CREAT | O_TRUNC))) return 0;
    if (flags & (O_CREAT | O_TRUNC)) {
        int met = meet(CREATE, dir, path);
        if (met && errno == EEXIST && !(flags & O_EXCL)) errno = EROFS;
        return met;
    }
    return harm == READ_ONLY && meet(SYNC, dir, path);
}

#define MODE(flags) mode_t mode = 0; \
    if ((flags) & (O_CREAT | __O_TMPFILE)) { \
        va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); }
#define OPEN(name) int name(const char *path, int flags, ...) { MODE(flags) \
    return opens(AT_FDCWD, path, flags) ? -1 : REAL(name)(path, flags, mode); }
#define OPENAT(name) int name(int dir, const char *path, int flags, ...) { MODE(flags) \
    return opens(dir, path, flags) ? -1 : REAL(name)(dir, path, flags, mode); }
#define FOPEN(name) FILE *name(const char *path, const char *mode) { \
    return *mode != 'r' && opens(AT_FDCWD, path, O_WRONLY | O_CREAT) ? NULL : REAL(name)(path, mode); }
OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64) FOPEN(fopen) FOPEN(fopen64)

static int at_fd(enum sort sort, int fd) { return fd > 2 ? meet(sort, fd, "") : 0; }

ssize_t write(int fd, const void *data, size_t size) {
    int met = at_fd(WRITE, fd);
    if (met == 2 && REAL(write)(fd, data, size / 2) <= (ssize_t)size) kill(getpid(), SIGKILL);
    return met ? -1 : REAL(write)(fd, data, size);
}

/* result name(arguments): one that is met before it is carried out */
#define CALL(result, name, typed, given, met) result name typed { return met ? -1 : REAL(name) given; }
CALL(ssize_t, writev, (int fd, const struct iovec *parts, int n), (fd, parts, n), at_fd(WRITE, fd))
CALL(ssize_t, pwrite, (int fd, const void *data, size_t n, off_t where), (fd, data, n, where), at_fd(WRITE, fd))
CALL(ssize_t, pwrite64, (int fd, const void *data, size_t n, off64_t where), (fd, data, n, where), at_fd(WRITE, fd))
CALL(ssize_t, sendfile, (int to, int from, off_t *where, size_t n), (to, from, where, n), at_fd(WRITE, to))
CALL(ssize_t, sendfile64, (int to, int from, off64_t *where, size_t n), (to, from, where, n), at_fd(WRITE, to))
CALL(int, ftruncate, (int fd, off_t size), (fd, size), at_fd(SYNC, fd))
CALL(int, ftruncate64, (int fd, off64_t size), (fd, size), at_fd(SYNC, fd))
CALL(int, fsync, (int fd), (fd), at_fd(SYNC, fd))
CALL(int, fdatasync, (int fd), (fd), at_fd(SYNC, fd))
CALL(int, mkdir, (const char *path, mode_t mode), (path, mode), meet(CREATE, AT_FDCWD, path))
CALL(int, mkdirat, (int dir, const char *path, mode_t mode), (dir, path, mode), meet(CREATE, dir, path))
CALL(int, rename, (const char *from, const char *to), (from, to), meet(RENAME, AT_FDCWD, to))
CALL(int, renameat, (int a, const char *from, int b, const char *to), (a, from, b, to), meet(RENAME, b, to))
CALL(int, unlink, (const char *path), (path), meet(REMOVE, AT_FDCWD, path))
CALL(int, unlinkat, (int dir, const char *path, int flags), (dir, path, flags), meet(REMOVE, dir, path))
CALL(int, rmdir, (const char *path), (path), meet(REMOVE, AT_FDCWD, path))
CALL(int, utimensat, (int dir, const char *path, const struct timespec when[2], int flags), (dir, path, when, flags),
     harm == READ_ONLY && meet(SYNC, dir, path))

int clock_gettime(clockid_t clock, struct timespec *now) {
    int done = REAL(clock_gettime)(clock, now);
    if (clock == CLOCK_REALTIME && !done) now->tv_sec -= back_s;
    return done;
}

time_t time(time_t *into) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (into) *into = now.tv_sec;
    return now.tv_sec;
}
