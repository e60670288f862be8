# The tool that the field reads checkpoint archives with; test/cri reads ours with it.

bin/checkpointctl: test/checkpointctl/go.mod test/checkpointctl/go.sum
	CGO_ENABLED=0 go -C test/checkpointctl build -trimpath -ldflags '-s -w' -o $(CURDIR)/$@ github.com/checkpoint-restore/checkpointctl
	@touch $@
