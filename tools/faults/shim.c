/* Counts the calls that a process makes on files below one directory, and lets chosen ones fail.

   LD_PRELOADed by the driver. FAULTS_BELOW is the directory, FAULTS_CONTROL a file that both map (struct control).
   A call is counted, and may fail, where its path or its descriptor leads below the directory. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum op { OPEN, READ, WRITE, PWRITE, FSYNC, FDATASYNC, RENAME, UNLINK, FTRUNCATE, FALLOCATE, MKDIR, MMAP, CLOSE, LSEEK,
          COPY };

enum how { ERROR, SHORT, LOST_ZEROS, LOST_CUT };

enum { FILES = 4096, NAME = 240 };

struct control {
    uint64_t armed;  /* nothing is counted and nothing fails while it is 0 */
    uint64_t count;  /* calls so far */
    uint64_t first;  /* the call that fails; 0: none */
    uint64_t times;  /* how many from that on */
    uint64_t ops;    /* bit 1 << op: that may fail */
    int32_t how, error;
    uint64_t hits;   /* how many have failed */
    uint64_t files;  /* of `synced` */
    struct { uint64_t inode, size; } synced[FILES]; /* how long each file was when it was last synced, or first seen */
    uint64_t logged; /* of `log`, where each call is described while there is room */
    struct { uint8_t op, name[NAME - 1]; } log[1 << 14];
};

static struct control *control;
static const char *below;
static size_t below_length;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

#define REAL(name) ({ static __typeof__(&name) real_; if (!real_) real_ = dlsym(RTLD_NEXT, #name); real_; })

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("FAULTS_CONTROL");
    below = getenv("FAULTS_BELOW");
    if (!path || !below)
        return;
    below_length = strlen(below);
    int fd = REAL(open)(path, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return;
    void *area = REAL(mmap)(NULL, sizeof(struct control), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    REAL(close)(fd);
    if (area != MAP_FAILED)
        control = area;
}

/* Whether a path leads below the directory; `name` has room for PATH_MAX and gets the rest of it. */
static int is_ours(const char *path, char *name) {
    if (strncmp(path, below, below_length) || (path[below_length] && path[below_length] != '/'))
        return 0;
    snprintf(name, PATH_MAX, "%s", path + below_length);
    return 1;
}

static int path_of_fd(int fd, char *path) {
    char link[32];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, PATH_MAX - 1);
    if (size < 0)
        return 0;
    path[size] = 0;
    return 1;
}

static uint64_t *synced_size(const struct stat *status) {
    for (uint64_t at = 0; at < control->files; at++)
        if (control->synced[at].inode == status->st_ino)
            return &control->synced[at].size;
    if (control->files == FILES)
        return NULL;
    control->synced[control->files].inode = status->st_ino;
    control->synced[control->files].size = status->st_size;
    return &control->synced[control->files++].size;
}

/* Note how much of a file is surely on the disk: `size`, or if that is negative what it was, or is if it is new here. */
static void note_synced(int fd, int64_t size) {
    struct stat status;
    if (!control || !control->armed || fstat(fd, &status) || !S_ISREG(status.st_mode))
        return;
    pthread_mutex_lock(&lock);
    uint64_t *known = synced_size(&status);
    if (known && size >= 0)
        *known = size;
    if (known && *known > (uint64_t)status.st_size)
        *known = status.st_size;
    pthread_mutex_unlock(&lock);
}

/* The kernel could not write what it had, and forgets it: from the last good sync on. */
static void forget(int fd, int how) {
    struct stat status;
    char link[32];
    if (fstat(fd, &status) || !S_ISREG(status.st_mode))
        return;
    pthread_mutex_lock(&lock);
    uint64_t *known = synced_size(&status);
    uint64_t size = known ? *known : 0;
    pthread_mutex_unlock(&lock);
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    if (truncate(link, size))
        return;
    if (how == LOST_ZEROS && truncate(link, status.st_size))
        return;
}

/* Count a call; returns whether it is to fail, with errno set, or to be short. */
static int fails(enum op op, int fd, const char *path, int directory) {
    char whole[2 * PATH_MAX], name[PATH_MAX];
    int keep = errno;
    if (!control || !control->armed)
        return 0;
    if (!path || (path[0] != '/' && directory != AT_FDCWD)) {
        if (!path_of_fd(path ? directory : fd, whole))
            return 0;
        if (path) {
            size_t length = strlen(whole);
            snprintf(whole + length, PATH_MAX, "/%s", path);
        }
        path = whole;
    }
    if (!is_ours(path, name)) {
        errno = keep;
        return 0;
    }
    uint64_t number = __atomic_add_fetch(&control->count, 1, __ATOMIC_SEQ_CST);
    uint64_t at = __atomic_fetch_add(&control->logged, 1, __ATOMIC_SEQ_CST);
    if (at < sizeof control->log / sizeof control->log[0]) {
        control->log[at].op = op;
        snprintf((char *)control->log[at].name, NAME - 1, "%s", name);
    }
    errno = keep;
    if (!control->first || number < control->first || number - control->first >= control->times ||
        !(control->ops >> op & 1))
        return 0;
    __atomic_add_fetch(&control->hits, 1, __ATOMIC_SEQ_CST);
    if (control->how == LOST_ZEROS || control->how == LOST_CUT)
        forget(fd, control->how);
    errno = control->error;
    return 1;
}

static int is_short(void) { return control->how == SHORT; }

/* Paths */

#define OPEN_FUNCTION(name)                                                                                            \
    int name(const char *path, int flags, ...) {                                                                       \
        va_list more;                                                                                                  \
        va_start(more, flags);                                                                                         \
        mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(more, mode_t) : 0;                                      \
        va_end(more);                                                                                                  \
        if (fails(OPEN, -1, path, AT_FDCWD))                                                                           \
            return -1;                                                                                                 \
        int fd = REAL(name)(path, flags, mode);                                                                        \
        if (fd >= 0)                                                                                                   \
            note_synced(fd, flags & O_TRUNC ? 0 : -1);                                                                 \
        return fd;                                                                                                     \
    }
OPEN_FUNCTION(open)
OPEN_FUNCTION(open64)

#define OPENAT_FUNCTION(name)                                                                                          \
    int name(int directory, const char *path, int flags, ...) {                                                        \
        va_list more;                                                                                                  \
        va_start(more, flags);                                                                                         \
        mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(more, mode_t) : 0;                                      \
        va_end(more);                                                                                                  \
        if (fails(OPEN, -1, path, directory))                                                                          \
            return -1;                                                                                                 \
        int fd = REAL(name)(directory, path, flags, mode);                                                             \
        if (fd >= 0)                                                                                                   \
            note_synced(fd, flags & O_TRUNC ? 0 : -1);                                                                 \
        return fd;                                                                                                     \
    }
OPENAT_FUNCTION(openat)
OPENAT_FUNCTION(openat64)

int rename(const char *from, const char *to) {
    return fails(RENAME, -1, to, AT_FDCWD) ? -1 : REAL(rename)(from, to);
}

int renameat(int from_directory, const char *from, int to_directory, const char *to) {
    return fails(RENAME, -1, to, to_directory) ? -1 : REAL(renameat)(from_directory, from, to_directory, to);
}

int unlink(const char *path) { return fails(UNLINK, -1, path, AT_FDCWD) ? -1 : REAL(unlink)(path); }

int unlinkat(int directory, const char *path, int flags) {
    return fails(UNLINK, -1, path, directory) ? -1 : REAL(unlinkat)(directory, path, flags);
}

int mkdir(const char *path, mode_t mode) { return fails(MKDIR, -1, path, AT_FDCWD) ? -1 : REAL(mkdir)(path, mode); }

int mkdirat(int directory, const char *path, mode_t mode) {
    return fails(MKDIR, -1, path, directory) ? -1 : REAL(mkdirat)(directory, path, mode);
}

/* Descriptors */

#define SIZED(op, size) /* how many bytes are to be moved; returns from the function for an error */                  \
    if (fails(op, fd, NULL, 0)) {                                                                                      \
        if (!is_short())                                                                                               \
            return -1;                                                                                                 \
        size = size / 2 ? size / 2 : size;                                                                             \
    }

ssize_t read(int fd, void *data, size_t size) { SIZED(READ, size) return REAL(read)(fd, data, size); }

ssize_t pread(int fd, void *data, size_t size, off_t at) { SIZED(READ, size) return REAL(pread)(fd, data, size, at); }

ssize_t pread64(int fd, void *data, size_t size, off64_t at) {
    SIZED(READ, size) return REAL(pread64)(fd, data, size, at);
}

ssize_t preadv64(int fd, const struct iovec *vector, int count, off64_t at) {
    return fails(READ, fd, NULL, 0) && !is_short() ? -1 : REAL(preadv64)(fd, vector, count, at);
}

ssize_t write(int fd, const void *data, size_t size) { SIZED(WRITE, size) return REAL(write)(fd, data, size); }

ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    SIZED(PWRITE, size) return REAL(pwrite)(fd, data, size, at);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    SIZED(PWRITE, size) return REAL(pwrite64)(fd, data, size, at);
}

ssize_t writev(int fd, const struct iovec *vector, int count) {
    if (!fails(WRITE, fd, NULL, 0))
        return REAL(writev)(fd, vector, count);
    if (!is_short())
        return -1;
    /* Half of the first, or one of them. */
    return REAL(write)(fd, vector->iov_base, vector->iov_len / 2 ? vector->iov_len / 2 : vector->iov_len);
}

#define SYNC_FUNCTION(name, op)                                                                                        \
    int name(int fd) {                                                                                                 \
        struct stat status;                                                                                            \
        if (fails(op, fd, NULL, 0))                                                                                    \
            return -1;                                                                                                 \
        if (!control || !control->armed || fstat(fd, &status))                                                         \
            return REAL(name)(fd);                                                                                     \
        /* No real one: this is about the order, and a disk is slow. */                                                \
        note_synced(fd, status.st_size);                                                                               \
        return 0;                                                                                                      \
    }
SYNC_FUNCTION(fsync, FSYNC)
SYNC_FUNCTION(fdatasync, FDATASYNC)

#define TRUNCATE_FUNCTION(name, type)                                                                                  \
    int name(int fd, type size) {                                                                                      \
        if (fails(FTRUNCATE, fd, NULL, 0))                                                                             \
            return -1;                                                                                                 \
        int result = REAL(name)(fd, size);                                                                             \
        note_synced(fd, -1);                                                                                           \
        return result;                                                                                                 \
    }
TRUNCATE_FUNCTION(ftruncate, off_t)
TRUNCATE_FUNCTION(ftruncate64, off64_t)

int posix_fallocate(int fd, off_t at, off_t size) {
    return fails(FALLOCATE, fd, NULL, 0) ? errno : REAL(posix_fallocate)(fd, at, size);
}

int posix_fallocate64(int fd, off64_t at, off64_t size) {
    return fails(FALLOCATE, fd, NULL, 0) ? errno : REAL(posix_fallocate64)(fd, at, size);
}

int fallocate64(int fd, int mode, off64_t at, off64_t size) {
    return fails(FALLOCATE, fd, NULL, 0) ? -1 : REAL(fallocate64)(fd, mode, at, size);
}

void *mmap(void *address, size_t size, int access, int flags, int fd, off_t at) {
    return fd >= 0 && fails(MMAP, fd, NULL, 0) ? MAP_FAILED : REAL(mmap)(address, size, access, flags, fd, at);
}

void *mmap64(void *address, size_t size, int access, int flags, int fd, off64_t at) {
    return fd >= 0 && fails(MMAP, fd, NULL, 0) ? MAP_FAILED : REAL(mmap64)(address, size, access, flags, fd, at);
}

int close(int fd) {
    int is_bad = fails(CLOSE, fd, NULL, 0), error = errno;
    int result = REAL(close)(fd); /* it is closed all the same */
    if (!is_bad)
        return result;
    errno = error;
    return -1;
}

off_t lseek(int fd, off_t at, int whence) { return fails(LSEEK, fd, NULL, 0) ? -1 : REAL(lseek)(fd, at, whence); }

off64_t lseek64(int fd, off64_t at, int whence) {
    return fails(LSEEK, fd, NULL, 0) ? -1 : REAL(lseek64)(fd, at, whence);
}

ssize_t copy_file_range(int from, off64_t *from_at, int fd, off64_t *at, size_t size, unsigned flags) {
    SIZED(COPY, size) return REAL(copy_file_range)(from, from_at, fd, at, size, flags);
}
