/* The floor that the other servers are measured against: the same sends from a loop in C.
 *
 * usage: c_loop PORT PAYLOAD_FILE STEP_NS        (PORT 0: the kernel chooses)
 *
 * Listens on loopback, prints "PORT PID", answers each request head with the head of a chunked event stream, and from then
 * on sends the payload as one chunk to each connection at every step: one send() on a non-blocking socket and nothing else.
 * GET /healthz is answered 200. Whatever else a client sends is read and ignored. A short or refused send closes the
 * connection, so a reader that falls behind shows as an ended stream and never as cheaper tokens.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum { MAX_FDS = 20000, MAX_PAYLOAD = 65536, MAX_EVENTS = 256 };

static const char STREAM_HEAD[] = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
                                  "cache-control: no-store\r\ntransfer-encoding: chunked\r\n\r\n";
static const char HEALTH_REPLY[] = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok";
static const char HEALTH_REQUEST[] = "GET /healthz ";
static const char HEAD_END[] = "\r\n\r\n";

/* What is known of one connection: how much of HEAD_END and HEALTH_REQUEST has matched, and its place in `streaming`. */
struct peer {
    uint8_t end_matched;
    uint8_t health_matched;
    int32_t place; /* -1 until it streams */
};

static struct peer peers[MAX_FDS];
static int streaming[MAX_FDS];
static int streaming_count;
static char message[MAX_PAYLOAD + 32];
static size_t message_length;

static void die(const char *what) {
    perror(what);
    exit(1);
}

static void load_message(const char *path) {
    static char payload[MAX_PAYLOAD];
    FILE *file = fopen(path, "rb");
    if (!file) die(path);
    size_t length = fread(payload, 1, sizeof payload, file);
    if (length == 0 || !feof(file)) {
        fprintf(stderr, "%s: empty or longer than %d bytes\n", path, MAX_PAYLOAD - 1);
        exit(1);
    }
    fclose(file);
    int prefix = sprintf(message, "%zx\r\n", length);
    memcpy(message + prefix, payload, length);
    memcpy(message + prefix + length, "\r\n", 2);
    message_length = (size_t)prefix + length + 2;
}

static void drop(int fd) {
    int place = peers[fd].place;
    if (place >= 0) {
        int moved = streaming[--streaming_count];
        streaming[place] = moved;
        peers[moved].place = place;
    }
    close(fd);
}

/* Walks backwards because drop() moves the last connection into the place of the one dropped. */
static void send_step(void) {
    for (int i = streaming_count - 1; i >= 0; i--) {
        ssize_t sent = send(streaming[i], message, message_length, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent != (ssize_t)message_length) drop(streaming[i]);
    }
}

static void answer(int fd) {
    struct peer *peer = &peers[fd];
    int healthy = peer->health_matched == sizeof HEALTH_REQUEST - 1;
    const char *reply = healthy ? HEALTH_REPLY : STREAM_HEAD;
    size_t length = healthy ? sizeof HEALTH_REPLY - 1 : sizeof STREAM_HEAD - 1;
    if (send(fd, reply, length, MSG_DONTWAIT | MSG_NOSIGNAL) != (ssize_t)length || healthy) {
        drop(fd);
        return;
    }
    peer->place = streaming_count;
    streaming[streaming_count++] = fd;
}

/* Returns whether the byte completes the request head. */
static int take(struct peer *peer, char byte) {
    if (peer->health_matched < sizeof HEALTH_REQUEST - 1)
        peer->health_matched = byte == HEALTH_REQUEST[peer->health_matched] ? peer->health_matched + 1 : UINT8_MAX;
    if (byte == HEAD_END[peer->end_matched]) peer->end_matched++;
    else peer->end_matched = byte == '\r';
    return peer->end_matched == sizeof HEAD_END - 1;
}

static void receive(int fd) {
    char data[16384];
    ssize_t length = recv(fd, data, sizeof data, MSG_DONTWAIT);
    if (length == 0 || (length < 0 && errno != EAGAIN && errno != EINTR)) {
        drop(fd);
        return;
    }
    if (peers[fd].place >= 0) return;
    for (ssize_t i = 0; i < length; i++) {
        if (take(&peers[fd], data[i])) {
            answer(fd);
            return;
        }
    }
}

static void accept_all(int listener, int poller) {
    for (;;) {
        int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0) return;
        if (fd >= MAX_FDS) {
            close(fd);
            continue;
        }
        int on = 1;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        peers[fd] = (struct peer){.place = -1};
        struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
        if (epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event) < 0) die("epoll_ctl");
    }
}

static int listen_on(uint16_t port) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0) die("socket");
    int on = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    if (bind(fd, (struct sockaddr *)&address, sizeof address) < 0) die("bind");
    if (listen(fd, 4096) < 0) die("listen");
    socklen_t size = sizeof address;
    if (getsockname(fd, (struct sockaddr *)&address, &size) < 0) die("getsockname");
    printf("%d %d\n", ntohs(address.sin_port), (int)getpid());
    fflush(stdout);
    return fd;
}

/* Steps stay on an absolute grid: the kernel counts those that passed while the loop was busy. */
static int start_timer(long long step_ns) {
    int fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    if (fd < 0) die("timerfd_create");
    struct timespec step = {.tv_sec = step_ns / 1000000000, .tv_nsec = step_ns % 1000000000};
    struct itimerspec every = {.it_interval = step, .it_value = step};
    if (timerfd_settime(fd, 0, &every, NULL) < 0) die("timerfd_settime");
    return fd;
}

static void raise_file_limit(void) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) < 0) return;
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
}

static void watch(int poller, int fd) {
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
    if (epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event) < 0) die("epoll_ctl");
}

int main(int argc, char **argv) {
    if (argc != 4 || atoll(argv[3]) <= 0) {
        fprintf(stderr, "usage: c_loop PORT PAYLOAD_FILE STEP_NS\n");
        return 2;
    }
    load_message(argv[2]);
    raise_file_limit();
    int poller = epoll_create1(EPOLL_CLOEXEC);
    if (poller < 0) die("epoll_create1");
    int listener = listen_on((uint16_t)atoi(argv[1]));
    int timer = start_timer(atoll(argv[3]));
    watch(poller, listener);
    watch(poller, timer);
    for (;;) {
        struct epoll_event events[MAX_EVENTS];
        int count = epoll_wait(poller, events, MAX_EVENTS, -1);
        if (count < 0 && errno != EINTR) die("epoll_wait");
        uint64_t steps = 0;
        for (int i = 0; i < count; i++) {
            int fd = events[i].data.fd;
            if (fd == listener) accept_all(listener, poller);
            else if (fd == timer) (void)!read(timer, &steps, sizeof steps);
            else receive(fd);
        }
        while (steps-- > 0) send_step();
    }
}
