package restoring

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/nodeapi"
)

// Annotations that a sandbox asks to be restored by.
const (
	annotationFrom   = nodeapi.AnnotationPrefix + "restore-from"
	annotationTicket = nodeapi.AnnotationPrefix + "restore-ticket"
)

// Reasons of refusals that are found here and not by the resolver.
const (
	reasonMissing = "CheckpointDataMissing"
	reasonCorrupt = "CheckpointDataCorrupt"
	reasonFailed  = "RestoreFailed"
	reasonBusy    = "RestoreInProgress"
)

// Compatibility says whether a checkpoint can be restored on this node.
type Compatibility interface {
	CheckRestore(ctx context.Context, m *checkpoint.Manifest) error
}

// Config is what Sessions are made of.
type Config struct {
	// StateDir keeps one record for each sandbox being restored, on memory: a
	// record outlives the agent and not the node's containers.
	StateDir string
	// FreezeHook and Path are handed to the OCI runtime, as nodeapi describes.
	FreezeHook, Path string
	Resolver         Resolver
	Observer         Observer
	Compatibility    Compatibility
	Log              *slog.Logger
}

// Sessions answers the OCI runtime's questions.
type Sessions struct {
	Config

	mu      sync.Mutex // guards tickets, turns and every record on disk
	tickets map[string]string
	turns   map[podName]nodeapi.Sandbox // whose restore is under way
}

// podName is what restores are serialised by (P24). A UID would not do: a Pod that
// is deleted while it restores and its successor of the same name differ in it.
type podName struct{ namespace, name string }

var _ nodeapi.Handler = (*Sessions)(nil)

// New makes Sessions; records of earlier runs in StateDir go on.
func New(c Config) (*Sessions, error) {
	if err := os.MkdirAll(c.StateDir, 0o700); err != nil {
		return nil, fmt.Errorf("make the directory of restore records: %w", err)
	}
	return &Sessions{Config: c, tickets: map[string]string{}, turns: map[podName]nodeapi.Sandbox{}}, nil
}

// record is what is kept of one sandbox.
type record struct {
	Sandbox  nodeapi.Sandbox `json:"sandbox"`
	Ordinary bool            `json:"ordinary,omitempty"`
	Dir      string          `json:"dir,omitempty"`
	// CompletedInit names the init containers that are not run again.
	CompletedInit []string `json:"completedInit,omitempty"`
	// Together names the containers that are let go together.
	Together []string `json:"together,omitempty"`
	// Created and Started name the containers that have come that far.
	Created []string `json:"created,omitempty"`
	Started []string `json:"started,omitempty"`
	// Filling names, for a volume, the container that was told to fill it. What that
	// has come to may never be known: its report is lost when the agent is away.
	Filling map[string]string `json:"filling,omitempty"`
}

// Issue implements criservice.Tickets.
func (s *Sessions) Issue(dir string) string {
	ticket := rand.Text()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tickets[ticket] = dir
	return ticket
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
		response, err = s.createSandbox(ctx, request.CreateSandbox.Sandbox)
	case request.CreateContainer != nil:
		response, err = s.createContainer(ctx, *request.CreateContainer)
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

func (s *Sessions) createSandbox(ctx context.Context, sandbox nodeapi.Sandbox) (nodeapi.Response, error) {
	rec, err := s.inTurn(ctx, sandbox)
	if err != nil {
		refusal := refusalOf(err)
		s.Observer.Refused(ctx, sandbox, refusal)
		return nodeapi.Response{}, refusal
	}
	if err := errors.Join(s.supersede(sandbox), s.save(rec)); err != nil {
		s.endTurn(sandbox.ID)
		return nodeapi.Response{}, err
	}
	if rec.Ordinary {
		return nodeapi.Response{Action: nodeapi.ActionOrdinary}, nil
	}
	s.Observer.Began(ctx, sandbox)
	return nodeapi.Response{Action: nodeapi.ActionRestore, Together: rec.Together}, nil
}

// inTurn admits a sandbox unless a restore of another Pod of its name is under way.
// Turns are kept in memory alone: nobody waits for a restore whose end was told to
// an agent that is gone.
func (s *Sessions) inTurn(ctx context.Context, sandbox nodeapi.Sandbox) (record, error) {
	if sandbox.Annotations[annotationTicket] != "" {
		return s.admit(ctx, sandbox) // RestorePod: its caller knows what it does at a time
	}
	name := podName{sandbox.Namespace, sandbox.Name}
	s.mu.Lock()
	other, busy := s.turns[name]
	if busy = busy && other.UID != sandbox.UID; !busy {
		s.turns[name] = sandbox
	}
	s.mu.Unlock()
	if busy {
		return record{}, &nodeapi.Error{Reason: reasonBusy, Message: fmt.Sprintf(
			"a restore of another Pod %s/%s, of UID %s, is still under way on this node; this one waits for its end", name.namespace, name.name, other.UID)}
	}
	rec, err := s.admit(ctx, sandbox)
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

// admit finds the checkpoint and checks all of it before anything is started.
func (s *Sessions) admit(ctx context.Context, sandbox nodeapi.Sandbox) (record, error) {
	source, err := s.source(ctx, sandbox)
	if err != nil {
		return record{}, err
	}
	rec := record{Sandbox: sandbox, Ordinary: source.Ordinary, Dir: source.Dir, CompletedInit: source.CompletedInit, Together: source.Together}
	if source.Ordinary {
		return rec, nil
	}
	m, err := checkpoint.Verify(ctx, source.Dir, source.ManifestDigest)
	switch {
	case errors.Is(err, checkpoint.ErrMissing):
		return record{}, &nodeapi.Error{Reason: reasonMissing, Message: err.Error()}
	case errors.Is(err, checkpoint.ErrCorrupt):
		return record{}, &nodeapi.Error{Reason: reasonCorrupt, Message: err.Error()}
	case err != nil:
		return record{}, err
	}
	if err := s.Compatibility.CheckRestore(ctx, m); err != nil {
		return record{}, err
	}
	return rec, nil
}

// source asks the ticket, where there is one, and the resolver otherwise.
func (s *Sessions) source(ctx context.Context, sandbox nodeapi.Sandbox) (Source, error) {
	if ticket := sandbox.Annotations[annotationTicket]; ticket != "" {
		s.mu.Lock()
		defer s.mu.Unlock()
		dir, ok := s.tickets[ticket]
		delete(s.tickets, ticket)
		if !ok {
			return Source{}, &nodeapi.Error{Reason: reasonFailed, Message: "the annotation " + annotationTicket + " names no prepared restore; only RestorePod of the CRI sets it"}
		}
		return Source{Dir: dir}, nil
	}
	if sandbox.Annotations[annotationFrom] == "" {
		return Source{}, &nodeapi.Error{Reason: reasonFailed, Message: "the sandbox does not ask to be restored"}
	}
	return s.Resolver.Resolve(ctx, sandbox)
}

func (s *Sessions) createContainer(ctx context.Context, in nodeapi.CreateContainer) (nodeapi.Response, error) {
	rec, err := s.load(in.Sandbox.ID)
	if errors.Is(err, fs.ErrNotExist) {
		// Fail closed: an ordinary start would pass for a restored one.
		return nodeapi.Response{}, &nodeapi.Error{Reason: reasonFailed, Message: "nothing was prepared for sandbox " + in.Sandbox.ID}
	} else if err != nil {
		return nodeapi.Response{}, err
	}
	switch {
	case rec.Ordinary, slices.Contains(rec.Started, in.Container):
		return nodeapi.Response{Action: nodeapi.ActionOrdinary}, nil
	case slices.Contains(rec.CompletedInit, in.Container):
		return nodeapi.Response{Action: nodeapi.ActionCompleted}, nil
	}
	m, _, err := checkpoint.ReadManifest(rec.Dir)
	if err != nil {
		return nodeapi.Response{}, err
	}
	i := slices.IndexFunc(m.Containers, func(c checkpoint.Container) bool { return c.Name == in.Container })
	if i < 0 {
		return nodeapi.Response{}, &nodeapi.Error{Reason: "PodSpecMismatch", Message: fmt.Sprintf("the checkpoint holds no container %q", in.Container)}
	}
	workDir := filepath.Join(s.StateDir, in.Sandbox.ID+".work", in.Container)
	if err := os.MkdirAll(workDir, 0o700); err != nil {
		return nodeapi.Response{}, fmt.Errorf("make the engine's work directory: %w", err)
	}
	answer := &nodeapi.ContainerRestore{
		ImageDir:   filepath.Join(rec.Dir, "containers", in.Container, "criu"),
		WorkDir:    workDir,
		FreezeHook: s.FreezeHook,
		Path:       s.Path,
	}
	if answer.Volumes, err = s.fill(in.Sandbox.ID, m, in.Container); err != nil {
		return nodeapi.Response{}, err
	}
	if archive := m.Containers[i].Rootfs; archive != "" {
		answer.RootfsArchive = filepath.Join(rec.Dir, filepath.FromSlash(archive))
	}
	return nodeapi.Response{Action: nodeapi.ActionRestore, Container: answer}, nil
}

// fill lists the volumes that a container is to fill, and keeps that it is: those it
// mounts, unless another container that mounts them was told to or exists. To fill
// one again would replace files that another container, held before its start, has
// open.
func (s *Sessions) fill(sandboxID string, m *checkpoint.Manifest, container string) ([]nodeapi.VolumeRestore, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	rec, err := s.read(sandboxID)
	if err != nil {
		return nil, err
	}
	var volumes []nodeapi.VolumeRestore
	for _, v := range m.Volumes {
		filled := slices.ContainsFunc(v.Mounts, func(m checkpoint.VolumeMount) bool { return slices.Contains(rec.Created, m.Container) })
		by := rec.Filling[v.Name]
		if by == container && filled && !slices.Contains(rec.Created, container) {
			return nil, &nodeapi.Error{Reason: reasonFailed, Message: fmt.Sprintf("nobody knows whether container %s, tried again, has filled volume %s, "+
				"and another container that mounts it is there already: restore another Pod", container, v.Name)}
		}
		if by != "" && by != container {
			filled = true
		}
		i := slices.IndexFunc(v.Mounts, func(m checkpoint.VolumeMount) bool { return m.Container == container })
		if !filled && i >= 0 {
			volumes = append(volumes, nodeapi.VolumeRestore{
				Archive:     filepath.Join(rec.Dir, filepath.FromSlash(v.Archive)),
				Destination: v.Mounts[i].Destination,
			})
			if rec.Filling == nil {
				rec.Filling = map[string]string{}
			}
			rec.Filling[v.Name] = container
		}
	}
	return volumes, s.write(rec)
}

// unfill lets any container fill the volumes that a failed one was told to.
func (s *Sessions) unfill(sandboxID, container string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	rec, err := s.read(sandboxID)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	maps.DeleteFunc(rec.Filling, func(_, by string) bool { return by == container })
	return s.write(rec)
}

func (s *Sessions) report(ctx context.Context, in nodeapi.Report) error {
	if in.Stage == nodeapi.StageDeleted {
		s.endTurn(in.Sandbox.ID)
		return s.forget(in.Sandbox.ID)
	}
	if in.Stage == nodeapi.StageFailed {
		if err := s.unfill(in.Sandbox.ID, in.Container); err != nil {
			return err
		}
		s.Observer.Failed(ctx, in.Sandbox, in.Container, in.Message)
		return nil
	}
	rec, whole, err := s.advance(in)
	if err != nil {
		return err
	}
	if whole {
		s.endTurn(in.Sandbox.ID)
		s.Observer.Succeeded(ctx, rec.Sandbox)
	}
	return nil
}

// advance notes how far a container has come, and says whether it was the last.
func (s *Sessions) advance(in nodeapi.Report) (rec record, whole bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if rec, err = s.read(in.Sandbox.ID); err != nil {
		return rec, false, err
	}
	switch in.Stage {
	case nodeapi.StageCreated:
		rec.Created = add(rec.Created, in.Container)
		return rec, false, s.write(rec)
	case nodeapi.StageStarted:
		rec.Started = add(rec.Started, in.Container)
	default:
		return rec, false, fmt.Errorf("unknown stage %q of a restore", in.Stage)
	}
	if err := s.write(rec); err != nil {
		return rec, false, err
	}
	m, _, err := checkpoint.ReadManifest(rec.Dir)
	if err != nil {
		return rec, false, err
	}
	return rec, rec.whole(m), nil
}

// whole says whether every container of the checkpoint has been let go.
func (rec record) whole(m *checkpoint.Manifest) bool {
	return !slices.ContainsFunc(m.Containers, func(c checkpoint.Container) bool { return !slices.Contains(rec.Started, c.Name) })
}

func add(names []string, name string) []string {
	if slices.Contains(names, name) {
		return names
	}
	return append(names, name)
}

func (s *Sessions) file(sandboxID string) (string, error) {
	if sandboxID == "" || filepath.Base(sandboxID) != sandboxID {
		return "", fmt.Errorf("bad sandbox ID %q", sandboxID)
	}
	return filepath.Join(s.StateDir, sandboxID+".json"), nil
}

func (s *Sessions) save(rec record) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.write(rec)
}

func (s *Sessions) load(sandboxID string) (record, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.read(sandboxID)
}

func (s *Sessions) write(rec record) error {
	file, err := s.file(rec.Sandbox.ID)
	if err != nil {
		return err
	}
	data, err := json.Marshal(rec)
	if err != nil {
		return err
	}
	if err := checkpoint.WriteFile(file, data, 0o600); err != nil {
		return fmt.Errorf("keep the record of a restore: %w", err)
	}
	return nil
}

func (s *Sessions) read(sandboxID string) (record, error) {
	file, err := s.file(sandboxID)
	if err != nil {
		return record{}, err
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return record{}, fmt.Errorf("read the record of a restore: %w", err)
	}
	var rec record
	if err := json.Unmarshal(data, &rec); err != nil {
		return record{}, fmt.Errorf("read the record of a restore: %s: %w", file, err)
	}
	return rec, nil
}

// forget drops what was kept for a sandbox.
func (s *Sessions) forget(sandboxID string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	file, err := s.file(sandboxID)
	if err != nil {
		return err
	}
	if err := os.RemoveAll(filepath.Join(s.StateDir, sandboxID+".work")); err != nil {
		return err
	}
	if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// supersede drops what was kept for earlier sandboxes of the same Pod. There is one
// at a time; the record of another is of one that its runtime was killed over, and
// would keep the checkpoint's data in use for ever.
func (s *Sessions) supersede(sandbox nodeapi.Sandbox) error {
	if sandbox.UID == "" || sandbox.Annotations[annotationTicket] != "" {
		return nil
	}
	records, err := s.records()
	if err != nil {
		return err
	}
	for _, rec := range records {
		if rec.Sandbox.UID == sandbox.UID && rec.Sandbox.ID != sandbox.ID && rec.Sandbox.Annotations[annotationTicket] == "" {
			if err := s.forget(rec.Sandbox.ID); err != nil {
				return fmt.Errorf("forget sandbox %s, which %s follows: %w", rec.Sandbox.ID, sandbox.ID, err)
			}
		}
	}
	return nil
}

func (s *Sessions) records() ([]record, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	files, err := filepath.Glob(filepath.Join(s.StateDir, "*.json"))
	if err != nil {
		return nil, err
	}
	var records []record
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		var rec record
		if err := json.Unmarshal(data, &rec); err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		records = append(records, rec)
	}
	return records, nil
}

// InUse lists the checkpoint directories that a restore under way reads: their
// data must stay until every container has been let go.
func (s *Sessions) InUse() ([]string, error) {
	records, err := s.records()
	if err != nil {
		return nil, err
	}
	var dirs []string
	for _, rec := range records {
		if rec.Ordinary {
			continue
		}
		m, _, err := checkpoint.ReadManifest(rec.Dir)
		if err == nil && !rec.whole(m) {
			dirs = append(dirs, rec.Dir)
		}
	}
	return dirs, nil
}
