# memdevd: `make demo` runs the main job, `make test` passes the tests; both install what they need (Debian, root).

SWIFT      ?= swift
CC         ?= cc
DESTDIR    ?=
PREFIX     ?= /usr
LIBDIR     ?= $(PREFIX)/lib/$(shell $(CC) -dumpmachine 2>/dev/null || echo lib)
BUILD      := .build
RELEASE    := $(BUILD)/release
LIBSOURCES := $(wildcard Sources/libmemdev/*.c)
CFLAGS_LIB := -std=gnu11 -O2 -g -fPIC -Wall -Wextra -Werror -fvisibility=hidden

.PHONY: all build demo demo-crash demo-migrate test test-systemd check bench bench-programs bench-migrate fuzz simulate policy-table policy-table-recorded install clean deps lint format help

help:
	@echo 'make demo     boot a stock QEMU Linux guest whose RAM memdevd owns, with DRAM for half of it'
	@echo 'make demo-crash  the same with the server killed every second'
	@echo 'make demo-migrate  the guest moves to another memdevd with DRAM for half of it, and back (two network namespaces)'
	@echo 'make test     unit tests, tests of libmemdev, fuzz corpora, QEMU end to end'
	@echo 'make test-systemd  the service under a systemd that runs, in a container: restarts, kills, watchdog, sockets'
	@echo 'make check    format lint, warnings as errors, unit tests under Address- and ThreadSanitizer'
	@echo 'make bench    figures against kernel swap and a bare C fault handler: table, JSON, SVG in bench-out/'
	@echo 'make bench-programs  a sort, Redis and a column scan on memdevd, kernel swap, zswap and enough DRAM; what sampling costs; idle memory'
	@echo 'make bench-migrate  migration into a host with half of the DRAM: memdevd beside pre-copy under kernel swap and stock QEMU'
	@echo 'make fuzz     the decoders under libFuzzer for a bounded time (SECONDS=60 each)'
	@echo 'make simulate  the engine under a simulated kernel, disk and guest, one run for each seed (SEEDS=10000)'
	@echo 'make policy-table  miss ratios of the eviction policy beside LRU, FIFO, random and the optimum (TRACE=FILE: for a recorded trace)'
	@echo 'make policy-table-recorded  the same for what a sort, a column scan, touches and requests to Redis do, recorded on the way'
	@echo 'make install  into DESTDIR=$(DESTDIR) PREFIX=$(PREFIX)'

all: build

# Debian packages: asked for only when something is missing, so that the second run costs nothing.
deps:
	@contrib/install-dependencies build

# The linker's warning about mktemp is of Foundation's, in a function that nothing here calls.
build: deps
	@$(SWIFT) build -c release --static-swift-stdlib --product memdevd
	@$(SWIFT) build -c release --static-swift-stdlib --product memdevctl
	@$(MAKE) --no-print-directory $(RELEASE)/libmemdev.so

# After the release build, which makes this directory (a link).
$(RELEASE)/libmemdev.so: $(LIBSOURCES) $(wildcard Sources/libmemdev/*.h Sources/libmemdev/include/*.h)
	$(CC) -shared $(CFLAGS_LIB) $(LIBSOURCES) -o $@ -ldl -lpthread

demo: build
	MEMDEVD=$(RELEASE)/memdevd MEMDEVCTL=$(RELEASE)/memdevctl LIBMEMDEV=$(RELEASE)/libmemdev.so contrib/demo/demo

demo-crash: build
	MEMDEVD=$(RELEASE)/memdevd MEMDEVCTL=$(RELEASE)/memdevctl LIBMEMDEV=$(RELEASE)/libmemdev.so contrib/demo/demo --kill-server 1

demo-migrate: build
	MEMDEVD=$(RELEASE)/memdevd MEMDEVCTL=$(RELEASE)/memdevctl LIBMEMDEV=$(RELEASE)/libmemdev.so contrib/demo/migrate

test: build
	@contrib/install-dependencies test
	Tests/run

test-systemd: build
	MEMDEVD=$(RELEASE)/memdevd MEMDEVCTL=$(RELEASE)/memdevctl Tests/systemd/run

check: deps lint
	$(SWIFT) build --build-tests --scratch-path .build-check -Xswiftc -warnings-as-errors -Xcc -Werror -Xcc -Wall -Xcc -Wextra
	$(SWIFT) test --scratch-path .build-check --skip-build
	Tests/sanitize address
	Tests/sanitize thread

lint:
	$(SWIFT) format lint --strict --parallel --recursive Package.swift Sources Tests

format:
	$(SWIFT) format --in-place --parallel --recursive Package.swift Sources Tests

bench: build
	@contrib/install-dependencies bench
	MEMDEVD=$(RELEASE)/memdevd MEMDEVCTL=$(RELEASE)/memdevctl contrib/bench/bench $(BENCH)

bench-programs: build
	@contrib/install-dependencies bench-programs
	MEMDEVD=$(RELEASE)/memdevd MEMDEVCTL=$(RELEASE)/memdevctl contrib/bench/programs $(BENCH)

bench-migrate: build
	@contrib/install-dependencies bench-migrate
	MEMDEVD=$(RELEASE)/memdevd MEMDEVCTL=$(RELEASE)/memdevctl LIBMEMDEV=$(abspath $(RELEASE))/libmemdev.so contrib/bench/migrate $(BENCH)

SECONDS ?= 60
fuzz: deps
	Tests/Fuzz/run --seconds $(SECONDS)

SEEDS ?= 10000
simulate: deps
	Tests/Simulation/run --seeds $(SEEDS)

policy-table: deps
	Tests/PolicyTable/run $(foreach file,$(TRACE),--trace $(file))

policy-table-recorded: deps
	Tests/PolicyTable/record

install: build
	install -D -m 755 $(RELEASE)/memdevd $(DESTDIR)$(PREFIX)/sbin/memdevd
	install -D -m 755 $(RELEASE)/memdevctl $(DESTDIR)$(PREFIX)/bin/memdevctl
	install -D -m 644 $(RELEASE)/libmemdev.so $(DESTDIR)$(LIBDIR)/libmemdev.so
	install -D -m 644 Sources/libmemdev/include/memdev.h $(DESTDIR)$(PREFIX)/include/memdev.h
	install -D -m 644 contrib/systemd/memdevd.service $(DESTDIR)$(PREFIX)/lib/systemd/system/memdevd.service
	install -D -m 644 contrib/systemd/memdevd.socket $(DESTDIR)$(PREFIX)/lib/systemd/system/memdevd.socket
	install -D -m 755 contrib/systemd/stop-service $(DESTDIR)$(PREFIX)/lib/memdevd/stop-service
	install -D -m 644 contrib/systemd/sysusers.conf $(DESTDIR)$(PREFIX)/lib/sysusers.d/memdevd.conf
	install -D -m 644 contrib/systemd/tmpfiles.conf $(DESTDIR)$(PREFIX)/lib/tmpfiles.d/memdevd.conf
	install -D -m 644 contrib/memdevd.yaml $(DESTDIR)/etc/memdevd/memdevd.yaml
	for page in contrib/man/*; do install -D -m 644 $$page $(DESTDIR)$(PREFIX)/share/man/man$${page##*.}/$${page##*/}; done
	install -d $(DESTDIR)$(PREFIX)/share/bash-completion/completions $(DESTDIR)$(PREFIX)/share/zsh/vendor-completions $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d
	$(RELEASE)/memdevctl --generate-completion-script bash > $(DESTDIR)$(PREFIX)/share/bash-completion/completions/memdevctl
	$(RELEASE)/memdevctl --generate-completion-script zsh > $(DESTDIR)$(PREFIX)/share/zsh/vendor-completions/_memdevctl
	$(RELEASE)/memdevctl --generate-completion-script fish > $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/memdevctl.fish

clean:
	rm -rf .build .build-* bench-out demo-out fuzz-out
