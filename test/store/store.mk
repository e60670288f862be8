# Stores against the real thing: an S3 server and a registry, as processes.

# Unpacked, not installed: Debian's package would start a service.
bin/docker-registry: hack/debian.sh hack/apt.sh
	hack/debian.sh $${STASIS_CACHE:-$$HOME/.cache/stasis}/docker-registry docker-registry -libc6 -adduser -passwd -lsb-base \
		-init-system-helpers -sysvinit-utils -usrmerge -dpkg -tar -debconf -perl -perl-base -perl-modules-5.36 -libperl5.36
	@mkdir -p bin
	cp $${STASIS_CACHE:-$$HOME/.cache/stasis}/docker-registry/root/usr/bin/docker-registry $@

bin/versitygw: test/store/versitygw/go.mod test/store/versitygw/go.sum
	CGO_ENABLED=0 go -C test/store/versitygw build -trimpath -ldflags '-s -w' -o $(CURDIR)/$@ github.com/versity/versitygw/cmd/versitygw
	@touch $@

.PHONY: test-store soak-store
test-store: deps bin/docker-registry bin/versitygw ## checkpoint stores in a real registry and a real S3 server
	go test -count=1 ./test/store

soak-store: deps bin/docker-registry bin/versitygw ## kill writers, collectors and readers of stores; ROUNDS=500 SEED=…
	STASIS_STORE_ROUNDS=$(if $(filter file default undefined,$(origin ROUNDS)),500,$(ROUNDS)) STASIS_STORE_SEED=$(SEED) \
		go test -count=1 -timeout 2h -v -run TestWhoeverIsKilledNoCheckpointIsLostAndNothingStaysForGood ./test/store
