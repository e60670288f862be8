package house

import (
	"encoding/json"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"sigs.k8s.io/controller-runtime/pkg/metrics"
	// What stasis-controller serves besides its own.
	_ "sigs.k8s.io/controller-runtime/pkg/webhook"
	"sigs.k8s.io/yaml"

	"podstasis.dev/stasis/internal/agent"
	"podstasis.dev/stasis/internal/controller"
)

// kepMetrics are those of P31 with their labels.
var kepMetrics = map[string]string{
	"stasis_pod_checkpoint_operations_total":          "result",
	"stasis_pod_checkpoint_duration_seconds":          "result",
	"stasis_pod_checkpoint_size_bytes":                "",
	"stasis_pod_checkpoint_freeze_seconds":            "capture",
	"stasis_pod_restore_operations_total":             "result",
	"stasis_pod_restore_duration_seconds":             "",
	"stasis_runtime_operations_errors_total":          "operation_type",
	"stasis_podcheckpoint_ready_condition_total":      "status,reason",
	"stasis_podcheckpoint_reconcile_duration_seconds": "",
}

// ownMetrics are those that the KEP has no names for.
var ownMetrics = map[string]string{
	"stasis_checkpoint_fetched_bytes_total":    "",
	"stasis_checkpoint_fetch_duration_seconds": "result",
}

// storeMetrics are Stasis' own: of CheckpointStores, of which there are few, and of as
// many of their namespaces as a status tells.
var storeMetrics = map[string]string{
	"stasis_store_ready":                     "store",
	"stasis_store_checkpoints":               "store",
	"stasis_store_logical_bytes":             "store",
	"stasis_store_stored_bytes":              "store",
	"stasis_store_capacity_bytes":            "store",
	"stasis_store_namespace_stored_bytes":    "store,namespace",
	"stasis_store_collections_total":         "store,result",
	"stasis_store_collected_bytes_total":     "store",
	"stasis_store_retention_deletions_total": "store",
}

// descriptions is a registry that keeps what is registered.
type descriptions struct {
	prometheus.Registerer
	labels map[string]string // by name
}

func (d *descriptions) Register(c prometheus.Collector) error {
	found := make(chan *prometheus.Desc)
	go func() {
		c.Describe(found)
		close(found)
	}()
	for desc := range found {
		m := description.FindStringSubmatch(desc.String())
		d.labels[m[1]] = m[2]
	}
	return nil
}

func (d *descriptions) MustRegister(cs ...prometheus.Collector) {
	for _, c := range cs {
		_ = d.Register(c)
	}
}

var description = regexp.MustCompile(`fqName: "([^"]+)".*variableLabels: \{([^}]*)\}`)

func registered(t *testing.T) map[string]string {
	t.Helper()
	d := &descriptions{labels: map[string]string{}}
	agent.NewMetrics(d)
	if _, err := controller.NewMetrics(d); err != nil {
		t.Fatal(err)
	}
	return d.labels
}

func TestMetricsHaveTheKEPsNamesAndNoObjectsNameAsALabel(t *testing.T) {
	got := registered(t)
	want := maps.Clone(kepMetrics)
	maps.Copy(want, ownMetrics)
	maps.Copy(want, storeMetrics)
	if !maps.Equal(got, want) {
		t.Errorf("registered are\n%v\nwant\n%v", got, want)
	}
}

// What Prometheus and its language have of their own.
var promQL = []string{"up", "sum", "by", "le", "rate", "increase", "histogram_quantile", "absent", "unless"}

var (
	values  = regexp.MustCompile(`^label_values\(([a-z_]+), node\)$`)
	quoted  = regexp.MustCompile(`"[^"]*"`)
	ranges  = regexp.MustCompile(`\[[^\]]*\]`)
	groups  = regexp.MustCompile(`\bby \([^)]*\)`)
	braces  = regexp.MustCompile(`\{[^}]*\}`)
	words   = regexp.MustCompile(`\b[a-z_][a-z_0-9]+\b`)
	label   = regexp.MustCompile(`([a-z_]+)\s*(=~|!=|!~|=)`)
	suffix  = regexp.MustCompile(`_(bucket|sum|count)$`)
	targets = []string{"job", "node", "le", "code", "webhook"}
)

// used returns the names of metrics and labels in an expression.
func used(expr string) (names, labels []string) {
	if variable := values.FindStringSubmatch(expr); variable != nil {
		return variable[1:2], nil // the label is the target's
	}
	expr = quoted.ReplaceAllString(expr, `""`)
	for _, b := range braces.FindAllString(expr, -1) {
		for _, l := range label.FindAllStringSubmatch(b, -1) {
			labels = append(labels, l[1])
		}
	}
	for _, g := range groups.FindAllString(expr, -1) {
		labels = append(labels, words.FindAllString(g[strings.Index(g, "("):], -1)...)
	}
	expr = groups.ReplaceAllString(braces.ReplaceAllString(ranges.ReplaceAllString(expr, ""), ""), "")
	for _, w := range words.FindAllString(expr, -1) {
		if !slices.Contains(promQL, w) {
			names = append(names, w)
		}
	}
	return names, labels
}

// expressions finds the values of the keys expr and query in a document.
func expressions(in any) (found []string) {
	switch v := in.(type) {
	case map[string]any:
		for key, value := range v {
			if s, ok := value.(string); ok && (key == "expr" || key == "query" && strings.Contains(s, "(")) {
				found = append(found, s)
			}
			found = append(found, expressions(value)...)
		}
	case []any:
		for _, value := range v {
			found = append(found, expressions(value)...)
		}
	}
	return found
}

func TestDashboardAndAlertsUseMetricsThatExist(t *testing.T) {
	ours := registered(t)
	library := &descriptions{labels: map[string]string{}}
	if err := library.Register(metrics.Registry.(prometheus.Collector)); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{"stasis.json", "rules.yaml"} {
		content, err := os.ReadFile("../../config/monitoring/" + file)
		if err != nil {
			t.Fatal(err)
		}
		var document any
		if strings.HasSuffix(file, ".json") {
			err = json.Unmarshal(content, &document)
		} else {
			err = yaml.Unmarshal(content, &document)
		}
		if err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		all := expressions(document)
		if len(all) < 8 {
			t.Errorf("%s: %d expressions were found", file, len(all))
		}
		seen := map[string]bool{}
		for _, expr := range all {
			names, labels := used(expr)
			known := slices.Clone(targets)
			for _, name := range names {
				name = suffix.ReplaceAllString(name, "")
				seen[name] = true
				of, is := ours[name]
				if !is {
					of, is = library.labels[name]
				}
				if !is {
					t.Errorf("%s: no program of Stasis has the metric %s: %s", file, name, expr)
				}
				known = append(known, strings.Split(of, ",")...)
			}
			for _, l := range labels {
				if !slices.Contains(known, l) {
					t.Errorf("%s: the metrics of %s have no label %s", file, expr, l)
				}
			}
		}
		for name := range kepMetrics {
			if file == "stasis.json" && !seen[name] {
				t.Errorf("%s does not show %s", file, name)
			}
		}
	}
}

func TestEachAlertNamesAPartOfTheRunbook(t *testing.T) {
	parts := anchors(t, "../../docs/runbook.md")
	rules, err := os.ReadFile("../../config/monitoring/rules.yaml")
	if err != nil {
		t.Fatal(err)
	}
	alerts := strings.Count(string(rules), "- alert:")
	links := regexp.MustCompile(`runbook: docs/runbook\.md#(\S+)`).FindAllStringSubmatch(string(rules), -1)
	if len(links) != alerts {
		t.Errorf("%d alerts name %d parts of the runbook", alerts, len(links))
	}
	for _, l := range links {
		if !slices.Contains(parts, l[1]) {
			t.Errorf("docs/runbook.md has no part #%s", l[1])
		}
	}
}
