# Images without Docker. "make images" leaves archives in dist/images; the programs
# in them are static. Included by the Makefile in the root.

.PHONY: images image-files images-demo images-e2e test-images

IMAGE_TAG ?= dev
IMAGE_LDFLAGS = -s -w $(LDFLAGS)

images: dist/images/stasis-agent.tar dist/images/stasis-controller.tar images-demo ## Build all images, without Docker
images-demo: dist/images/stasis-demo.tar
images-e2e: dist/images/stasis-e2e.tar dist/images/stasis-objects.tar
image-files: dist/bin/stasis-agent dist/bin/stasis-runtime dist/bin/stasis-restore dist/bin/stasis-controller dist/criu/VERSION ## Build what the Dockerfiles copy

test-images: ## Test the image builder
	go -C hack/images vet ./... && go -C hack/images test ./...

# What Go builds is out of date or not by what Go knows, not by what make sees: it
# is always asked, and the file is touched only when it changed.
.PHONY: FORCE
FORCE:

dist/bin/stasis-agent dist/bin/stasis-restore dist/bin/stasis-controller: dist/bin/%: FORCE
	@mkdir -p $(@D)
	CGO_ENABLED=0 go build -trimpath -ldflags '$(IMAGE_LDFLAGS)' -o $@.new ./cmd/$*
	@cmp -s $@.new $@ && rm $@.new || mv $@.new $@

# What runs as root and reads what users wrote. The rules depend on this file: on the
# compiler's options.
HARDENED = -std=c11 -D_GNU_SOURCE -D_FORTIFY_SOURCE=2 -O2 -fstack-protector-strong -Wall -Wextra -Werror -Wl,-z,relro,-z,now -s
dist/bin/stasis-runtime: internal/ociruntime/aside/stasis-runtime.c hack/images/images.mk
	@mkdir -p $(@D)
	$(or $(CC),cc) $(HARDENED) -fPIE -static-pie -o $@ $<

dist/bin/counter-a: FORCE
	@mkdir -p $(@D)
	CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o $@.new ./demo/counter-a
	@cmp -s $@.new $@ && rm $@.new || mv $@.new $@

dist/bin/counter-b: demo/counter-b/counter-b.c
	@mkdir -p $(@D)
	$(or $(CC),cc) -std=c11 -D_GNU_SOURCE -O2 -Wall -Wextra -Werror -static -s -o $@ $<

dist/bin/subject: FORCE
	@mkdir -p $(@D)
	CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o $@.new ./test/e2e/subject
	@cmp -s $@.new $@ && rm $@.new || mv $@.new $@

dist/bin/objects: $(wildcard test/e2e/objects/*.[ch])
	@mkdir -p $(@D)
	$(or $(CC),cc) -std=gnu17 -D_GNU_SOURCE -O2 -Wall -Wextra -Werror -static -pthread -s -o $@ $(filter %.c,$^)

dist/bin/images: $(wildcard hack/images/*.go hack/images/internal/*/*.go) hack/images/go.mod hack/images/go.sum
	@mkdir -p $(@D)
	go -C hack/images build -trimpath -o $(CURDIR)/$@ .

# Libraries that CRIU is started with.
CRIU_LIBRARIES = joinshm nopages ahead queues refill
dist/criu/VERSION: hack/criu.sh hack/foreign.sh hack/apt.sh internal/engine/criu/launcher/launcher.c $(foreach l,$(CRIU_LIBRARIES),internal/engine/criu/$(l)/$(l).c) hack/images/images.mk
	hack/criu.sh dist/criu
	set -e; for l in $(CRIU_LIBRARIES); do \
		$(or $(CC),cc) $(HARDENED) -shared -fPIC -o dist/criu/lib/stasis-$$l.so internal/engine/criu/$$l/$$l.c; \
	done
	@touch $@

dist/images/stasis-agent.tar: images/Dockerfile.agent dist/bin/images dist/bin/stasis-agent dist/bin/stasis-runtime dist/bin/stasis-restore dist/criu/VERSION $(wildcard images/rootfs/etc/*)
	dist/bin/images -f $< -t localhost/stasis-agent:$(IMAGE_TAG) -o $@ .

dist/images/stasis-controller.tar: images/Dockerfile.controller dist/bin/images dist/bin/stasis-controller $(wildcard images/rootfs/etc/*)
	dist/bin/images -f $< -t localhost/stasis-controller:$(IMAGE_TAG) -o $@ .

dist/images/stasis-demo.tar: demo/Dockerfile dist/bin/images dist/bin/counter-a dist/bin/counter-b
	dist/bin/images -f $< -t localhost/stasis-demo:$(IMAGE_TAG) -o $@ .

dist/images/stasis-e2e.tar: test/e2e/Dockerfile dist/bin/images dist/bin/subject
	dist/bin/images -f $< -t localhost/stasis-e2e:$(IMAGE_TAG) -o $@ .

dist/images/stasis-objects.tar: test/e2e/objects/Dockerfile dist/bin/images dist/bin/objects $(wildcard test/e2e/image/* test/e2e/objects/volume/*)
	dist/bin/images -f $< -t localhost/stasis-objects:$(IMAGE_TAG) -o $@ .
