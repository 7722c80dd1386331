/* The asking end: keeps N connections busy, one whole request at a time on each, and counts whole answers.
 *
 * usage: request_load PORT CONNECTIONS WARM_UP_MS MEASURED_MS REQUEST_FILE
 *
 * Connects to loopback, and on each connection sends the file's bytes, reads the answer to its end, and sends them again.
 * An answer ends where its content-length says, or with the last chunk; nothing is sent ahead, so that what has come is
 * one answer and its end is the end of what has come. After the warm-up it prints "begin" and the measured time later
 * "end ANSWERS BYTES", each in a line, at the very moment: whoever started it reads the server's CPU time then. An answer
 * other than 200, or an end of a connection, ends the program with exit code 1.
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
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { MAX_CONNECTIONS = 1024, MAX_REQUEST = 65536, MAX_ANSWER = 65536, MAX_EVENTS = 256, IDLE_MS = 5000 };

static const char OK[] = "HTTP/1.1 200 ";
static const char HEAD_END[] = "\r\n\r\n";
static const char LENGTH[] = "\r\ncontent-length:";
static const char LAST_CHUNK[] = "\r\n0\r\n\r\n";

struct connection {
    int fd;
    size_t received;
    size_t whole; /* the answer's length, once it is known; 0 before, and where there are chunks */
    char answer[MAX_ANSWER];
};

static struct connection connections[MAX_CONNECTIONS];
static char request[MAX_REQUEST];
static size_t request_length;

static void fail(const char *what) {
    fprintf(stderr, "%s\n", what);
    exit(1);
}

static void die(const char *what) {
    perror(what);
    exit(1);
}

static uint64_t now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

static void load_request(const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) die(path);
    request_length = fread(request, 1, sizeof request, file);
    if (request_length == 0 || !feof(file)) fail("the request is empty or too long");
    fclose(file);
}

static void ask(struct connection *connection) {
    connection->received = connection->whole = 0;
    ssize_t sent = send(connection->fd, request, request_length, MSG_NOSIGNAL);
    if (sent != (ssize_t)request_length) die("send");
}

static void open_all(int port, int count, int poller) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    for (int at = 0; at < count; at++) {
        struct connection *connection = &connections[at];
        int on = 1;
        connection->fd = socket(AF_INET, SOCK_STREAM, 0);
        if (connection->fd < 0) die("socket");
        if (connect(connection->fd, (struct sockaddr *)&address, sizeof address)) die("connect");
        setsockopt(connection->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = connection};
        if (epoll_ctl(poller, EPOLL_CTL_ADD, connection->fd, &event)) die("epoll_ctl");
        ask(connection);
    }
}

/* Whether the answer is whole. */
static int is_whole(struct connection *connection) {
    char *answer = connection->answer;
    size_t received = connection->received;
    if (!connection->whole) {
        answer[received] = 0;
        char *head_end = memmem(answer, received, HEAD_END, sizeof HEAD_END - 1);
        if (!head_end) return 0;
        if (strncmp(answer, OK, sizeof OK - 1)) fail(answer);
        char *body = head_end + sizeof HEAD_END - 1;
        char *length = strcasestr(answer, LENGTH);
        if (!length || length > head_end) {
            size_t size = sizeof LAST_CHUNK - 1;
            return received >= size && !memcmp(answer + received - size, LAST_CHUNK, size);
        }
        connection->whole = (size_t)(body - answer) + strtoul(length + sizeof LENGTH - 1, NULL, 10);
    }
    if (received > connection->whole) fail("more than one answer");
    return received == connection->whole;
}

static int receive(struct connection *connection) {
    size_t room = MAX_ANSWER - 1 - connection->received;
    ssize_t got = recv(connection->fd, connection->answer + connection->received, room, MSG_DONTWAIT);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) return 0;
    if (got < 0) die("recv");
    if (got == 0) fail(room ? "the server ended a connection" : "the answer is too long");
    connection->received += (size_t)got;
    return (int)got;
}

static void run_until(uint64_t end, int poller, uint64_t *answers, uint64_t *bytes) {
    struct epoll_event events[MAX_EVENTS];
    for (uint64_t now = now_ms(); now < end; now = now_ms()) {
        int ready = epoll_wait(poller, events, MAX_EVENTS, IDLE_MS);
        if (ready == 0) fail("no answer came for seconds");
        if (ready < 0 && errno != EINTR) die("epoll_wait");
        for (int at = 0; at < ready; at++) {
            struct connection *connection = events[at].data.ptr;
            *bytes += (uint64_t)receive(connection);
            if (is_whole(connection)) {
                *answers += 1;
                ask(connection);
            }
        }
    }
}

int main(int argc, char **argv) {
    if (argc != 6) fail("usage: request_load PORT CONNECTIONS WARM_UP_MS MEASURED_MS REQUEST_FILE");
    int count = atoi(argv[2]);
    if (count < 1 || count > MAX_CONNECTIONS) fail("too many connections");
    uint64_t answers = 0, bytes = 0;
    int poller = epoll_create1(0);
    load_request(argv[5]);
    open_all(atoi(argv[1]), count, poller);
    run_until(now_ms() + strtoul(argv[3], NULL, 10), poller, &answers, &bytes);
    answers = bytes = 0;
    puts("begin");
    fflush(stdout);
    run_until(now_ms() + strtoul(argv[4], NULL, 10), poller, &answers, &bytes);
    printf("end %llu %llu\n", (unsigned long long)answers, (unsigned long long)bytes);
    return 0;
}
