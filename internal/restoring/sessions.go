package restoring

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/nodeapi"
	"podstasis.dev/stasis/internal/pages"
	"podstasis.dev/stasis/internal/pages/lazy"
)

// Annotations that a sandbox asks to be restored by.
const (
	annotationFrom    = nodeapi.AnnotationPrefix + "restore-from"
	annotationFromUID = nodeapi.AnnotationPrefix + "restore-from-uid"
	annotationTicket  = nodeapi.AnnotationPrefix + "restore-ticket"
	annotationMemory  = nodeapi.AnnotationPrefix + "restore-memory"
)

// Reasons of refusals that are found here and not by the resolver.
const (
	reasonMissing = "CheckpointDataMissing"
	reasonCorrupt = "CheckpointDataCorrupt"
	reasonFailed  = "RestoreFailed"
	reasonBusy    = "RestoreInProgress"
)

// defaultEngine is that of a program that asks and names none.
const defaultEngine = "criu"

// Compatibility says whether a checkpoint can be restored on this node.
type Compatibility interface {
	CheckRestore(ctx context.Context, m *checkpoint.Manifest) error
	// Whole says whether the checkpoint's engine restores sandboxes as a whole. Of one
	// that does AdaptWhole is called, of another the methods after it.
	Whole(m *checkpoint.Manifest) bool
	// AdaptWhole writes the images of a sandbox, of the checkpoint in a directory, to
	// another as they are to be in the Pod's new sandbox.
	AdaptWhole(ctx context.Context, m *checkpoint.Manifest, checkpointDir string, to nodeapi.CreateSandbox, dir string) error
	// CheckPrivileges refuses images that would give processes more than their
	// container may have.
	CheckPrivileges(ctx context.Context, imageDir string, allowed *nodeapi.Privileges) error
	// Adapt writes a container's images to dir as they are to be in the Pod's new
	// sandbox, and says what else that takes, in the answer: all but its ImageDir.
	Adapt(ctx context.Context, to Adaptation, dir string) (*nodeapi.ContainerRestore, error)
}

// Adaptation is what a container's images are to be adapted to.
type Adaptation struct {
	Container string
	// ImageDirs are those of all containers of the checkpoint, by name.
	ImageDirs map[string]string
	// Created names the containers that have been restored in this sandbox.
	Created []string
	// Was and Is are the source Pod's addresses and the sandbox's.
	Was, Is []netip.Addr
}

// Config is what Sessions are made of.
type Config struct {
	// StateDir keeps one record for each sandbox being restored, on memory: a
	// record outlives the agent and not the node's containers.
	StateDir string
	// ImagesDir keeps the images of containers as they are restored from, as long as
	// that takes; it is on the file system of the checkpoints, or what is the same in
	// both is copied.
	ImagesDir string
	// FreezeHook and Path are handed to the OCI runtime, as nodeapi describes.
	FreezeHook, Path string
	// Memory says whose memory is given while it runs, and how.
	Memory Memory
	// NodeName is this node's, for restored containers to know; may be empty.
	NodeName      string
	Resolver      Resolver
	Blocks        Blocks
	Observer      Observer
	Compatibility Compatibility
	Node          Node
	Now           func() time.Time
	Log           *slog.Logger
}

// Sessions answers the OCI runtime's questions. What they keep of a restore is what
// the OCI runtime reported and, where that was lost, what Run finds on the node.
type Sessions struct {
	Config

	wake chan struct{} // has one element when Run has something to do at once

	mu      sync.Mutex // guards tickets, turns, making, checks, every record on disk, and images that go
	tickets map[string]ticket
	turns   map[podName]nodeapi.Sandbox // whose restore is under way
	making  map[string]int              // of whose sandbox images are being made, how many times
	checks  map[string]*check           // of what sandboxes are restored from, by their IDs
}

// podName is what restores are serialised by (P24). A UID would not do: a Pod that
// is deleted while it restores and its successor of the same name differ in it.
type podName struct{ namespace, name string }

var _ nodeapi.Handler = (*Sessions)(nil)

// New makes Sessions; records of earlier runs in StateDir go on.
func New(c Config) (*Sessions, error) {
	if err := errors.Join(os.MkdirAll(c.StateDir, 0o700), os.MkdirAll(c.ImagesDir, 0o700)); err != nil {
		return nil, fmt.Errorf("make the directories of restores: %w", err)
	}
	if err := checkpoint.RemoveTemporary(c.StateDir); err != nil {
		c.Log.Warn("what a killed agent had half written could not be removed", "error", err)
	}
	s := &Sessions{Config: c, tickets: map[string]ticket{}, turns: map[podName]nodeapi.Sandbox{}, making: map[string]int{}, checks: map[string]*check{}, wake: make(chan struct{}, 1)}
	records, err := s.records()
	if err != nil { // to be an agent that does not start would help nobody
		c.Log.Error("whose restores are under way is not known", "error", err)
	} else if err := s.dropForgottenImages(records); err != nil {
		c.Log.Warn("images of restores that are over could not be removed", "error", err)
	}
	for _, rec := range records {
		if !rec.Ordinary && !rec.whole() && rec.Sandbox.Annotations[annotationTicket] == "" {
			s.turns[podName{rec.Sandbox.Namespace, rec.Sandbox.Name}] = rec.Sandbox
		}
	}
	return s, nil
}

// ticket is for one restore.
type ticket struct {
	dir    string
	memory pages.Mode
}

// Issue implements criservice.Tickets.
func (s *Sessions) Issue(dir string, memory pages.Mode) string {
	name := rand.Text()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tickets[name] = ticket{dir, memory}
	return name
}

// Revoke implements criservice.Tickets.
func (s *Sessions) Revoke(ticket string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.tickets, ticket)
}

// Handle implements nodeapi.Handler.
func (s *Sessions) Handle(ctx context.Context, request nodeapi.Request) nodeapi.Response {
	var response nodeapi.Response
	var err error
	switch {
	case request.CreateSandbox != nil:
		response, err = s.createSandbox(ctx, *request.CreateSandbox)
	case request.CreateContainer != nil:
		response, err = s.createContainer(ctx, *request.CreateContainer)
	case request.Checked != nil:
		err = s.checked(ctx, *request.Checked)
	case request.Block != nil:
		response, err = s.block(ctx, *request.Block)
	case request.Report != nil:
		err = s.report(ctx, *request.Report)
	default:
		err = errors.New("the request asks nothing: stasis-runtime and stasis-agent are of different versions")
	}
	if err != nil {
		return nodeapi.Response{Error: refusalOf(err)}
	}
	return response
}

// refusalOf is the refusal in an error; what has no reason of its own failed.
func refusalOf(err error) *nodeapi.Error {
	var refusal *nodeapi.Error
	if errors.As(err, &refusal) {
		return refusal
	}
	return &nodeapi.Error{Reason: reasonFailed, Message: err.Error()}
}

func (s *Sessions) createSandbox(ctx context.Context, in nodeapi.CreateSandbox) (nodeapi.Response, error) {
	sandbox := in.Sandbox
	rec, err := s.inTurn(ctx, in)
	if err != nil {
		refusal := refusalOf(err)
		s.Observer.Refused(ctx, sandbox, refusal)
		return nodeapi.Response{}, refusal
	}
	if err := errors.Join(s.supersede(sandbox), s.save(rec)); err != nil {
		s.endTurn(sandbox.ID)
		return nodeapi.Response{}, err
	}
	if rec.Whole {
		if err := s.adaptWhole(ctx, rec, in); err != nil {
			s.endTurn(sandbox.ID)
			refusal := refusalOf(err)
			s.Observer.Refused(ctx, sandbox, refusal)
			return nodeapi.Response{}, errors.Join(refusal, s.forget(sandbox.ID))
		}
	}
	if rec.Ordinary {
		return nodeapi.Response{Action: nodeapi.ActionOrdinary}, nil
	}
	if rec.Unchecked {
		s.check(rec)
	}
	s.Observer.Began(ctx, sandbox)
	response := nodeapi.Response{Action: nodeapi.ActionRestore, Together: rec.Together}
	if rec.Whole {
		response.Whole = &nodeapi.SandboxRestore{ImageDir: s.images(sandbox.ID, wholeImages), Containers: rec.Containers, Background: !rec.Eager}
	}
	return response, nil
}

// inTurn admits a sandbox unless a restore of another Pod of its name is under way.
func (s *Sessions) inTurn(ctx context.Context, in nodeapi.CreateSandbox) (record, error) {
	sandbox := in.Sandbox
	if sandbox.Annotations[annotationTicket] != "" {
		return s.admit(ctx, in) // RestorePod: its caller knows what it does at a time
	}
	name := podName{sandbox.Namespace, sandbox.Name}
	s.mu.Lock()
	other, busy := s.turns[name]
	if busy = busy && other.UID != sandbox.UID; !busy {
		s.turns[name] = sandbox
	}
	s.mu.Unlock()
	if busy {
		s.Wake() // it may be over, and nobody said so
		return record{}, &nodeapi.Error{Reason: reasonBusy, Message: fmt.Sprintf(
			"a restore of another Pod %s/%s, of UID %s, is still under way on this node; this one waits for its end", name.namespace, name.name, other.UID)}
	}
	err := s.rememberEarlier(ctx, sandbox)
	var rec record
	if err == nil {
		rec, err = s.admit(ctx, in)
	}
	if err != nil || rec.Ordinary {
		s.endTurn(sandbox.ID)
	}
	return rec, err
}

// endTurn says that the restore of a sandbox is over, in whichever way.
func (s *Sessions) endTurn(sandboxID string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	maps.DeleteFunc(s.turns, func(_ podName, holder nodeapi.Sandbox) bool { return holder.ID == sandboxID })
}

// admit finds the checkpoint and checks all of it before anything is started, but memory
// that can be checked later.
func (s *Sessions) admit(ctx context.Context, in nodeapi.CreateSandbox) (record, error) {
	sandbox := in.Sandbox
	source, err := s.source(ctx, sandbox)
	if err != nil {
		return record{}, err
	}
	rec := record{Sandbox: sandbox, Since: s.Now(), Ordinary: source.Ordinary, Dir: source.Dir, CompletedInit: source.CompletedInit, Together: source.Together,
		Eager: source.Memory == pages.ModeEager}
	if source.Ordinary {
		return rec, nil
	}
	mode := source.Memory
	if source.Partial { // there is no other way
		rec.Partial, mode = true, pages.ModeLazy
	}
	verified, err := s.Memory.Policy.Verify(ctx, source.Dir, source.ManifestDigest, mode)
	if err != nil {
		return record{}, ofData(err)
	}
	m := verified.Manifest
	by := in.Engine
	if by == "" {
		by = defaultEngine
	}
	if m.Engine.Name != by {
		return record{}, fmt.Errorf("the checkpoint is of the engine %s, and the Pod's runtime handler restores with %s: a Pod that names no RuntimeClass gets the right one", m.Engine.Name, by)
	}
	if err := s.Compatibility.CheckRestore(ctx, m); err != nil {
		return record{}, err
	}
	if rec.Whole = s.Compatibility.Whole(m); rec.Whole && len(source.HoldUp) > 0 {
		return record{}, fmt.Errorf("%s, which the kubelet waits for before it starts the next container, and nothing of a Pod of the engine %s runs before its last container has been started",
			strings.Join(source.HoldUp, "; "), m.Engine.Name)
	}
	for _, c := range m.Containers {
		rec.Containers = append(rec.Containers, c.Name)
	}
	if verified.Lazily != nil {
		rec.Lazy, rec.Digest = true, verified.Lazily.ManifestDigest
	}
	if verified.Beside {
		rec.Unchecked, rec.Digest = true, source.ManifestDigest
	}
	if rec.Unchecked && rec.Whole { // its engine starts with all of it
		if err := pages.VerifyBeside(ctx, rec.Dir, rec.Digest, nil); err != nil {
			return record{}, ofData(err)
		}
		rec.Unchecked = false
	}
	rec.Since = s.Now() // to look at all of it may take long
	return rec, nil
}

// source asks the ticket, where there is one, and the resolver otherwise.
func (s *Sessions) source(ctx context.Context, sandbox nodeapi.Sandbox) (Source, error) {
	if ticket := sandbox.Annotations[annotationTicket]; ticket != "" {
		s.mu.Lock()
		defer s.mu.Unlock()
		of, ok := s.tickets[ticket]
		delete(s.tickets, ticket)
		if !ok {
			return Source{}, &nodeapi.Error{Reason: reasonFailed, Message: "the annotation " + annotationTicket + " names no prepared restore; only RestorePod of the CRI sets it"}
		}
		return Source{Dir: of.dir, Memory: of.memory}, nil
	}
	if sandbox.Annotations[annotationFrom] == "" {
		return Source{}, &nodeapi.Error{Reason: reasonFailed, Message: "the sandbox does not ask to be restored"}
	}
	mode, err := pages.ParseMode(sandbox.Annotations[annotationMemory])
	if err != nil {
		return Source{}, &nodeapi.Error{Reason: reasonFailed, Message: fmt.Sprintf("annotation %s: %v", annotationMemory, err)}
	}
	source, err := s.Resolver.Resolve(ctx, sandbox)
	source.Memory = mode
	return source, err
}

func (s *Sessions) createContainer(ctx context.Context, in nodeapi.CreateContainer) (nodeapi.Response, error) {
	rec, unclear, err := s.catchUp(ctx, in.Sandbox.ID)
	if errors.Is(err, fs.ErrNotExist) {
		// Fail closed: an ordinary start would pass for a restored one.
		return nodeapi.Response{}, &nodeapi.Error{Reason: reasonFailed, Message: "nothing was prepared for sandbox " + in.Sandbox.ID}
	} else if err != nil {
		return nodeapi.Response{}, err
	}
	if !rec.Seen { // nobody asks for containers of a sandbox that is not up
		if rec, err = s.update(in.Sandbox.ID, func(rec *record) { rec.Seen = true }); err != nil {
			return nodeapi.Response{}, err
		}
	}
	if slices.Contains(rec.Started, in.Container) && !rec.Whole {
		if rec, err = s.again(ctx, rec, in.Container); err != nil {
			return nodeapi.Response{}, err
		}
	}
	switch {
	case rec.Ordinary, slices.Contains(rec.Started, in.Container):
		return nodeapi.Response{Action: nodeapi.ActionOrdinary}, nil
	case slices.Contains(rec.CompletedInit, in.Container):
		return nodeapi.Response{Action: nodeapi.ActionCompleted}, nil
	case rec.whole(): // an ephemeral container: the Pod is one as any other now
		return nodeapi.Response{Action: nodeapi.ActionOrdinary}, nil
	case unclear[in.Container] != nil:
		// Restored again, it might run a second time; started anew, it might never have run.
		refusal := &nodeapi.Error{Reason: reasonFailed, Message: fmt.Sprintf("nobody knows whether container %s, whose start was interrupted, has run: "+
			"restore another Pod (%v)", in.Container, unclear[in.Container])}
		s.Observer.Failed(ctx, in.Sandbox, in.Container, refusal)
		return nodeapi.Response{}, refusal
	}
	m, _, err := checkpoint.ReadManifest(rec.Dir)
	if err != nil {
		return nodeapi.Response{}, err
	}
	i := slices.IndexFunc(m.Containers, func(c checkpoint.Container) bool { return c.Name == in.Container })
	if i < 0 {
		return nodeapi.Response{}, &nodeapi.Error{Reason: "PodSpecMismatch", Message: fmt.Sprintf("the checkpoint holds no container %q", in.Container)}
	}
	workDir := filepath.Join(s.workDirs(in.Sandbox.ID), in.Container)
	if err := errors.Join(os.MkdirAll(workDir, 0o700), nodeapi.ForgetProgress(workDir), lazy.Forget(workDir)); err != nil {
		return nodeapi.Response{}, fmt.Errorf("make the engine's work directory: %w", err)
	}
	if rec.Whole {
		return s.ofWhole(rec, m, i, workDir, in), nil
	}
	images := imagesOf(rec.Dir, in.Container)
	if err := s.Compatibility.CheckPrivileges(ctx, images, in.Privileges); err != nil {
		refusal := &nodeapi.Error{Reason: reasonFailed, Message: fmt.Sprintf("container %s is not restored: %v", in.Container, err)}
		s.Observer.Failed(ctx, in.Sandbox, in.Container, refusal)
		return nodeapi.Response{}, refusal
	}
	unchecked, err := s.unchecked(ctx, rec, in)
	if err != nil {
		return nodeapi.Response{}, err
	}
	adapted := s.images(in.Sandbox.ID, in.Container)
	made := s.makeImages(in.Sandbox.ID)
	answer, err := s.Compatibility.Adapt(ctx, adaptation(rec, m, in), adapted)
	made()
	if err != nil {
		err = fmt.Errorf("adapt the checkpoint's images to the new sandbox: %w", err)
		s.Observer.Failed(ctx, in.Sandbox, in.Container, refusalOf(err))
		return nodeapi.Response{}, err
	}
	if answer.Lazy, err = s.planMemory(ctx, rec, in.Container, workDir); err != nil {
		s.Observer.Failed(ctx, in.Sandbox, in.Container, refusalOf(err))
		return nodeapi.Response{}, err
	}
	answer.ImageDir, answer.FreezeHook, answer.Path, answer.Unchecked = adapted, s.FreezeHook, s.Path, unchecked
	s.addFiles(answer, rec, m, i, workDir, in)
	if archive := m.Containers[i].Rootfs; archive != "" {
		answer.RootfsArchive = filepath.Join(rec.Dir, filepath.FromSlash(archive))
	}
	return nodeapi.Response{Action: nodeapi.ActionRestore, Container: answer}, nil
}

// addFiles adds to an answer what is put in place for a container whatever the engine.
func (s *Sessions) addFiles(answer *nodeapi.ContainerRestore, rec record, m *checkpoint.Manifest, i int, workDir string, in nodeapi.CreateContainer) {
	answer.WorkDir = workDir
	answer.Identity = s.identity(in, m)
	answer.Volumes = rec.fill(m, in.Container)
	for _, p := range m.Containers[i].Published {
		answer.Published = append(answer.Published, nodeapi.Published(p))
	}
}

// wholeImages is where the adapted images of a whole sandbox are; no container's name
// begins so.
const wholeImages = ".sandbox"

func (s *Sessions) adaptWhole(ctx context.Context, rec record, in nodeapi.CreateSandbox) error {
	defer s.makeImages(in.Sandbox.ID)()
	m, _, err := checkpoint.ReadManifest(rec.Dir)
	if err == nil {
		err = s.Compatibility.AdaptWhole(ctx, m, rec.Dir, in, s.images(in.Sandbox.ID, wholeImages))
	}
	if err != nil {
		return fmt.Errorf("adapt the checkpoint's images to the new sandbox: %w", err)
	}
	return nil
}

// ofWhole is the answer for a container of a sandbox that is restored as a whole. That its
// processes get no more than its configuration gives is the engine's own affair: they are
// nowhere but inside its sandbox, whose walls are the new Pod's.
func (s *Sessions) ofWhole(rec record, m *checkpoint.Manifest, i int, workDir string, in nodeapi.CreateContainer) nodeapi.Response {
	answer := &nodeapi.ContainerRestore{}
	s.addFiles(answer, rec, m, i, workDir, in)
	return nodeapi.Response{Action: nodeapi.ActionRestore, Container: answer}
}

// imagesOf is where a checkpoint keeps the engine's images of a container.
func imagesOf(dir, container string) string {
	return filepath.Join(dir, "containers", container, "criu")
}

func adaptation(rec record, m *checkpoint.Manifest, in nodeapi.CreateContainer) Adaptation {
	a := Adaptation{Container: in.Container, ImageDirs: map[string]string{}, Created: rec.Created, Is: in.Addresses}
	for _, c := range m.Containers {
		a.ImageDirs[c.Name] = imagesOf(rec.Dir, c.Name)
	}
	for _, ip := range m.Sandbox.IPs {
		if addr, err := netip.ParseAddr(ip); err == nil { // what is none is nobody's
			a.Was = append(a.Was, addr)
		}
	}
	return a
}

// identity is who a container is from now on.
func (s *Sessions) identity(in nodeapi.CreateContainer, m *checkpoint.Manifest) nodeapi.Identity {
	var ips []string
	for _, a := range in.Addresses {
		ips = append(ips, a.String())
	}
	id := nodeapi.Identity{
		PodName: in.Sandbox.Name, PodNamespace: in.Sandbox.Namespace, PodUID: in.Sandbox.UID, PodIPs: ips, NodeName: s.NodeName, Container: in.Container,
		CheckpointName: in.Sandbox.Annotations[annotationFrom], CheckpointUID: in.Sandbox.Annotations[annotationFromUID],
		CutTime: m.CutTime.UTC(), RestoredAt: s.Now().UTC(),
		Source: nodeapi.IdentitySource{PodName: m.Sandbox.Name, PodNamespace: m.Sandbox.Namespace, PodUID: m.Sandbox.UID, PodIPs: m.Sandbox.IPs},
	}
	if len(ips) > 0 {
		id.PodIP = ips[0]
	}
	return id
}

// fill lists the volumes that a container is to fill: those it mounts, unless
// another container that mounts them has been restored. To fill one again would
// replace files that the other, held before its start, has open. The OCI runtime
// makes one container of a sandbox after the other, so none is under way.
func (rec record) fill(m *checkpoint.Manifest, container string) (volumes []nodeapi.VolumeRestore) {
	for _, v := range m.Volumes {
		if slices.ContainsFunc(v.Mounts, func(m checkpoint.VolumeMount) bool { return slices.Contains(rec.Created, m.Container) }) {
			continue
		}
		if i := slices.IndexFunc(v.Mounts, func(m checkpoint.VolumeMount) bool { return m.Container == container }); i >= 0 {
			volumes = append(volumes, nodeapi.VolumeRestore{
				Archive:     filepath.Join(rec.Dir, filepath.FromSlash(v.Archive)),
				Destination: v.Mounts[i].Destination,
			})
		}
	}
	return volumes
}

func (s *Sessions) report(ctx context.Context, in nodeapi.Report) error {
	switch in.Stage {
	case nodeapi.StageDeleted:
		return s.deleted(ctx, in.Sandbox.ID)
	case nodeapi.StageMemory:
		s.Wake()
		return nil
	case nodeapi.StageFailed:
		s.Observer.Failed(ctx, in.Sandbox, in.Container, &nodeapi.Error{Reason: reasonFailed, Message: in.Message})
		if in.Container == "" {
			return nil // a sandbox as a whole
		}
		return s.dropImages(in.Sandbox.ID, in.Container)
	}
	rec, err := s.advance(in)
	if err != nil {
		return err
	}
	if err := s.dropImages(in.Sandbox.ID, in.Container); err != nil {
		return err
	}
	if rec.whole() {
		s.endTurn(in.Sandbox.ID)
		s.Wake()
	}
	return nil
}

// deleted is told that a sandbox is gone. Reports of what it came to may have been
// lost before this one.
func (s *Sessions) deleted(ctx context.Context, sandboxID string) error {
	s.endTurn(sandboxID)
	rec, _, err := s.catchUp(ctx, sandboxID)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	if !rec.whole() || rec.Told {
		return s.forget(sandboxID)
	}
	_, err = s.update(sandboxID, func(rec *record) { rec.Gone = true })
	s.Wake()
	return err
}

// advance notes how far a container has come.
func (s *Sessions) advance(in nodeapi.Report) (record, error) {
	switch in.Stage {
	case nodeapi.StageCreated:
		return s.update(in.Sandbox.ID, func(rec *record) { rec.Created = add(rec.Created, in.Container) })
	case nodeapi.StageStarted:
		return s.update(in.Sandbox.ID, func(rec *record) { rec.Started = add(rec.Started, in.Container) })
	}
	return record{}, fmt.Errorf("unknown stage %q of a restore", in.Stage)
}
